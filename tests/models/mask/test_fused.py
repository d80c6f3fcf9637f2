"""A mask's Triton kernels, run by Triton's interpreter on a CPU: against the bank's own operations on the same noise."""

from __future__ import annotations

import os

import pytest
import torch

from models.mask import optimiser
from models.mask.bank import Draw, MaskBank, make_slot
from models.mask.fused import launch
from models.mask.fused.launch import FusedDraws, adam_step, device_bits, grid, has_triton
from models.mask.settings import Rule, Settings
from models.mask.slots import Spec
from models.mask.units import units_of

# conftest.py asks for the interpreter where there is no GPU; a machine without Triton has nothing to test here
pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
#: What scripts/gpu_check.sh runs on a GPU: every kernel, not every kind of one, for each takes a second to compile.
ON_A_GPU = pytest.mark.cuda
PUBLISHED = pytest.param("tensor", marks=ON_A_GPU)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: A tensor of several programs, one within a block, one whose entries end within eight.
SHAPES = {"a": (71, 60), "b": (16, 8), "c": (3, 7)}
TYPES = {"float32": (torch.float32, torch.float32, 2e-5), "narrow": (torch.bfloat16, torch.bfloat16, 2e-2)}


def made(settings, dtypes, excluded=(), seed=0):
    source = torch.Generator().manual_seed(seed)
    storage, logit_dtype, _ = dtypes
    slots = []
    for name, shape in SHAPES.items():
        units = None if name in excluded else units_of(name, shape, settings.granularity, 4, {})
        live = torch.nn.Parameter(torch.zeros(shape, dtype=storage, device=DEVICE))
        base, delta = torch.randn(shape, generator=source), torch.randn(shape, generator=source)
        slots.append(make_slot(Spec(name, name, "weight", shape, units), live, base, [delta], settings))
    bank = MaskBank(slots, settings, logit_dtype=logit_dtype)
    for p in bank.logits:
        p.data.copy_(torch.randn(p.shape, generator=source))
    bank.attach()
    return bank


def stepped(bank, draw, kernels, monkeypatch):
    """(live weights, logit gradients, masks of nothing) of two passes whose gradients add up."""
    monkeypatch.setattr(FusedDraws, "serves", FusedDraws.fits if kernels else lambda *_: False)
    # the bank's own operations see the kernels' noise
    monkeypatch.setattr("models.mask.bank.noise", lambda key, first, count, device: device_bits(
        key, first + count, device)[first:])
    bank.weight = 0.5
    for turn in range(2):
        bank.write(draw)
        written = [slot.live.detach().float().clone() for slot in bank.slots]
        sum(((slot.live.float() + turn) ** 2).sum() for slot in bank.slots).backward()
        bank.finish()
    return written, [p.grad.float() for p in bank.logits], bank.zero_masks


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rescale", ["none", PUBLISHED, "detached", "expected"])
def test_the_kernels_draw_what_the_operations_draw(rescale, types, monkeypatch):
    settings = Settings(rescale=rescale, rule=Rule("task_arithmetic", 0.3))
    compared(settings, Draw("k", 0.5), TYPES[types], monkeypatch)


@pytest.mark.parametrize("granularity", ["row", "block"])
@pytest.mark.parametrize("rescale", ["none", PUBLISHED, "expected"])
def test_logits_that_neighbours_share(granularity, rescale, monkeypatch):
    """Blocks of four: the last of a row has three."""
    compared(Settings(granularity=granularity, rescale=rescale), Draw("k", 0.5), TYPES["float32"], monkeypatch)


def test_hard_draws_of_rows_in_bfloat16(monkeypatch):
    compared(Settings(granularity="row"), Draw("k", 0.3, hard=True, mirrored=True), TYPES["narrow"], monkeypatch)


@pytest.mark.parametrize("draw", [Draw("k", 0.3), Draw("k", 0.5, hard=True), Draw("k", 0.5, mirrored=True)], ids=str)
def test_other_draws(draw, monkeypatch):
    compared(Settings(), draw, TYPES["float32"], monkeypatch)


def compared(settings, draw, dtypes, monkeypatch):
    (weights, gradients, _), (mine, ours, _) = (
        stepped(made(settings, dtypes, excluded="b"), draw, kernels, monkeypatch) for kernels in (False, True))
    for got, want in zip((*mine, *ours), (*weights, *gradients), strict=True):
        assert float(want.norm()) > 0
        assert float((got - want).norm() / want.norm()) < dtypes[2]


@pytest.mark.parametrize("granularity", ["element", "row", "block"])
def test_programs_that_walk_several_blocks(granularity, monkeypatch):
    monkeypatch.setattr(launch, "_PROGRAMS", 2)
    monkeypatch.setattr(launch, "_SUB", 4 if granularity == "row" else 64)
    assert grid(71 * 60, 8 * 64) == (2, 5)
    compared(Settings(granularity=granularity), Draw("k", 0.5), TYPES["float32"], monkeypatch)


def test_a_mask_of_zeros_gives_the_aligned_model(monkeypatch):
    bank = made(Settings(), TYPES["float32"])
    for p in bank.logits:
        p.data.fill_(-60.0)
    written, gradients, zeros = stepped(bank, Draw("k", 0.5, hard=True), True, monkeypatch)
    assert all(torch.equal(mine, slot.base.float()) for mine, slot in zip(written, bank.slots, strict=True))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert zeros == 2 * len(bank.slots)
    bank.zero_masks = 1
    assert bank.zero_masks == 1


@ON_A_GPU
def test_a_random_reference_ignores_the_logits(monkeypatch):
    monkeypatch.setattr(FusedDraws, "serves", FusedDraws.fits)
    one, other = (made(Settings(), TYPES["float32"]) for _ in range(2))
    other.logits[0].data.add_(1.0)
    for bank in (one, other):
        bank.write(Draw("k", trained=False))
    assert all(torch.equal(a.live, b.live) for a, b in zip(one.slots, other.slots, strict=True))


@ON_A_GPU
def test_noise_is_a_function_of_key_and_index():
    from scipy.stats import kstest

    bits = device_bits("s|1|w", 5000, DEVICE)
    assert torch.equal(device_bits("s|1|w", 3001, DEVICE), bits[:3001])
    assert float((device_bits("s|2|w", 5000, DEVICE) == bits).float().mean()) < 0.01
    assert kstest((bits.cpu().double() + 32768.5) / 65536, "uniform").pvalue > 1e-3
    # neighbours share a Philox counter and must not share their bits
    assert abs(float(torch.corrcoef(torch.stack([bits[:-1], bits[1:]]).double())[0, 1])) < 0.06


@ON_A_GPU
@pytest.mark.parametrize(("settings", "draw", "does"), [
    (Settings(), Draw("k"), True), (Settings(rescale="global"), Draw("k"), False),
    (Settings(rule=Rule("ties", 0.4)), Draw("k"), False), (Settings(granularity="layer"), Draw("k"), False),
    (Settings(granularity="row"), Draw("k"), True), (Settings(granularity="block"), Draw("k"), True),
    (Settings(), Draw("k", expected=True), False)])
def test_what_the_kernels_serve(settings, draw, does):
    bank = made(settings, TYPES["float32"])
    assert {bank.fused.fits(slot, draw) for slot in bank.slots} == {does}
    assert {bank.fused.serves(slot, draw) for slot in bank.slots} == {does and DEVICE == "cuda"}


@pytest.mark.parametrize(("granularity", "names"), [
    ("element", ("measure", "write", "scale_gradient", "logit_gradient")),
    ("row", ("measure_units", "write_units", "measure_units", "gather_units", "logit_gradient"))])
def test_few_kernels_a_draw_and_a_gradient(granularity, names, monkeypatch):
    from models.mask.fused import kernels

    launched = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, programs):
            return lambda *_, **__: launched.append(self.name)

    for name in set(names):
        monkeypatch.setattr(kernels, name, Counted(name))
    stepped(made(Settings(granularity=granularity), TYPES["float32"]), Draw("k"), True, monkeypatch)
    # two passes over three tensors
    assert sorted(launched) == sorted(names * 6)


@ON_A_GPU
def test_the_step_is_adam_rounded_to_chance(monkeypatch):
    size, source = 4003, torch.Generator().manual_seed(1)
    group = {"betas": (0.9, 0.999), "lr": 5e-3, "eps": 1e-8, "weight_decay": 0.1}
    gradient, values, mean = (torch.randn(size, generator=source).to(DEVICE).bfloat16() for _ in range(3))

    def stepped():
        places = [values.clone(), mean.clone(), mean.square()]
        adam_step(places[0], gradient, *places[1:], "k", 3, group)
        return places

    exact = [values.float(), mean.float(), mean.square().float()]
    monkeypatch.setattr(optimiser, "round_stochastically", lambda values, bits: values)
    nothing = torch.zeros(size, dtype=torch.int16, device=DEVICE)
    optimiser.adam_block(gradient, *exact, nothing, nothing, 3, group)
    for got, want in zip(mine := stepped(), exact, strict=True):
        # where terms cancel, fp32 itself differs by the order of a sum
        places = torch.frexp(want.abs().clamp_min(0.01)).exponent - 8
        off = (got.double() - want.double()) / torch.ldexp(torch.ones_like(want), places)
        # up or down to a neighbour, and right in the mean: 4003 draws of half a place, at four standard deviations
        assert float(off.abs().max()) < 1.001
        assert float((off.abs() > 1e-3).double().mean()) > 0.5
        assert abs(float(off.mean())) < 4 * 0.5 / size**0.5
    assert all(torch.equal(one, two) for one, two in zip(mine, stepped(), strict=True))
