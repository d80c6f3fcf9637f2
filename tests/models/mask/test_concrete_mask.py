"""The mask's formulas: draws, rescaling, read-outs, and the closed gradient against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from errors import UserError
from models.mask.bank import Draw, MaskBank, Slot
from models.mask.concrete import (
    entropy,
    hard_mask,
    mean_of,
    noise,
    prior_gradient,
    scale_for,
    soft_mask,
    uniform,
)
from models.mask.readout import read_out
from models.mask.rescale import RESCALES
from models.mask.rules import combined
from models.mask.settings import Readout, Rule, Settings, parse_readout, rule_for
from models.mask.slots import Spec
from models.mask.units import Units, units_of

SHAPES = {"a": (12, 8), "b": (6, 16), "n": (10,)}
CONFIG = {"hidden_size": 8, "num_attention_heads": 2}
RULES = {"single": (Rule(), 1), "task_arithmetic": (Rule("task_arithmetic", 0.3), 3), "average": (Rule("average", 0.5), 2),
         "ties": (Rule("ties", 0.4, density=0.4), 3), "dare": (Rule("dare", 0.3, drop=0.3), 2)}


def make_bank(settings, tasks, dtype=torch.float64, seed=0, spread=1.0):
    """A bank over three small tensors with random values and logits."""
    generator = torch.Generator().manual_seed(seed)
    slots = []
    for name, shape in SHAPES.items():
        weight = "model.layers.0.self_attn.q_proj.weight" if name == "a" else f"{name}.weight"
        spec = Spec(name, weight, "weight", shape, units_of(weight, shape, settings.granularity, 5, CONFIG))
        base = torch.randn(shape, generator=generator, dtype=dtype)
        deltas = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(tasks)]
        slots.append(Slot(spec, torch.nn.Parameter(torch.zeros_like(base)), base, combined(settings.rule, deltas), None))
        slots[-1].raw = deltas
    bank = MaskBank(slots, settings, logit_dtype=dtype)
    for p in bank.logits:
        p.data.copy_(spread * torch.randn(p.shape, generator=generator, dtype=dtype))
    bank.attach()
    return bank


def loss_of(thetas):
    """Something curved in every weight."""
    return sum((t * t.roll(1, 0)).sin().sum() + (t**3).sum() / 9 for t in thetas)


def reference(bank, draw):
    """Logits that require a gradient, and theta as a graph through them: the published way."""
    settings, logits, masks = bank.settings, [], {}
    for slot in bank.slots:
        s = bank.logits[slot.logits_index].detach().clone().requires_grad_(True)
        bits = noise(f"{draw.key}|{slot.spec.name}", 0, s.numel())
        u = uniform(~bits if draw.mirrored else bits, s.dtype)
        soft = torch.sigmoid((s + u.log() - (1 - u).log()) / draw.temperature)
        m = soft + ((soft > 0.5).to(soft) - soft).detach() if draw.hard else soft
        logits.append(s)
        masks[slot.spec.name] = (s, slot.spec.units.expand(m).expand(slot.spec.matrix))
    whole = torch.cat([m.reshape(-1) for _, m in masks.values()]).mean()
    vectors = []
    for slot in bank.slots:
        s, m = masks[slot.spec.name]
        keep = slot.spec.units.expand(torch.sigmoid(s)).expand(slot.spec.matrix).mean()
        scale = {"none": 1.0, "tensor": 1 / m.mean(), "detached": 1 / m.mean().detach(), "global": 1 / whole,
                 "expected": 1 / keep}[settings.rescale]
        vectors.append([(m * scale).view(d.shape) * d for d in slot.raw])
    return logits, [slot.base + fused for slot, fused in zip(bank.slots, _merged(bank, vectors, draw), strict=True)]


def _merged(bank, vectors, draw):
    rule = bank.settings.rule
    if rule.name == "ties":
        tasks = range(len(vectors[0]))
        flat = [torch.cat([v[i].detach().reshape(-1) for v in vectors]) for i in tasks]
        limits = [f.abs().float().topk(math.floor(rule.density * f.numel() + 1e-6)).values[-1] for f in flat]
        kept = [[v * (v.detach().abs() >= limits[i]) for i, v in enumerate(vs)] for vs in vectors]
        signs = [sum(k).detach() >= 0 for k in kept]
        return [rule.lambda_ * sum(v * ((v.detach() > 0) == positive) for v in ks)
                for ks, positive in zip(kept, signs, strict=True)]
    if rule.name == "dare":
        return [rule.lambda_ / (1 - rule.drop) * sum(
            v * (uniform(noise(f"{draw.key}|{slot.spec.name}|dare{i}", 0, v.numel())) >= rule.drop).view(v.shape)
            for i, v in enumerate(vs)) for slot, vs in zip(bank.slots, vectors, strict=True)]
    return [rule.lambda_ * sum(vs) for vs in vectors]


def check(bank, draw, tolerance=1e-6):
    logits, thetas = reference(bank, draw)
    loss_of(thetas).backward()
    bank.write(draw)
    lives = [slot.live for slot in bank.slots]
    for live, theta in zip(lives, thetas, strict=True):
        torch.testing.assert_close(live.detach(), theta.detach(), rtol=tolerance, atol=tolerance)
    loss_of(lives).backward()
    bank.finish()
    for mine, theirs in zip(bank.logits, logits, strict=True):
        assert float(theirs.grad.abs().max()) > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    assert all(live.grad is None for live in lives)


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_equals_autograd(rule, rescale):
    what, tasks = RULES[rule]
    check(make_bank(Settings(rescale=rescale, rule=what), tasks), Draw("k", 0.5))


@pytest.mark.parametrize("granularity", ["row", "block", "head", "layer"])
@pytest.mark.parametrize("rescale", RESCALES)
def test_gradient_of_shared_logits(granularity, rescale):
    check(make_bank(Settings(granularity=granularity, rescale=rescale, rule=RULES["ties"][0]), 3), Draw("k", 0.3))


@pytest.mark.parametrize("draw", [Draw("k", 0.5, hard=True), Draw("k", 0.2, mirrored=True), Draw("k", 1.0)], ids=str)
def test_gradient_of_other_draws(draw):
    check(make_bank(Settings(), 1), draw)


def test_gradient_in_float32():
    check(make_bank(Settings(rule=RULES["task_arithmetic"][0]), 3, dtype=torch.float32), Draw("k", 0.5), 2e-5)


def test_rank_components_share_their_logit_between_tasks():
    settings = Settings(space="factors", granularity="rank", rule=Rule("task_arithmetic", 0.3))
    index, shape = (-1, -1, 0, 1, 2, 0, 1, 2), (5, 8)
    spec = Spec("m.lora_B", "m.weight", "rank", shape, Units(shape, 5, 1, index))
    base, deltas = torch.zeros(shape), [torch.zeros(shape), torch.zeros(shape)]
    base[:, :2], deltas[0][:, 2:5], deltas[1][:, 5:] = 1.0, 2.0, 3.0
    bank = MaskBank([Slot(spec, torch.nn.Parameter(base.clone()), base, combined(settings.rule, deltas), None)], settings)
    bank.write(Draw("k"))
    live = bank.slots[0].live.detach()
    assert bank.logits[0].numel() == 3
    assert (live[:, :2] == 1).all()
    torch.testing.assert_close(live[:, 2:5] / 2, live[:, 5:] / 3)
    assert len(live[0].unique()) == 7


def test_every_task_gets_a_gradient_through_ties():
    """Upstream's TIES differentiated the first task alone (spec, B3)."""
    for silent in range(3):
        banks = [make_bank(Settings(rule=RULES["ties"][0]), 3) for _ in range(2)]
        for i, slot in enumerate(banks[1].slots):
            slot.deltas = [d if j != silent else torch.zeros_like(d) for j, d in enumerate(slot.deltas)]
            assert not slot.deltas[silent].any(), i
        for bank in banks:
            bank.write(Draw("k"))
            loss_of([slot.live for slot in bank.slots]).backward()
        assert any(not torch.equal(a.grad, b.grad) for a, b in zip(banks[0].logits, banks[1].logits, strict=True))


def test_per_task_ties_terms_add_up():
    """With G = 1 the inner term is lambda sum_i I_i delta_i: each task's selected entries, and nothing else."""
    bank = make_bank(Settings(rescale="none", rule=Rule("ties", 0.4, density=0.5)), 2)
    bank.write(Draw("k"))
    sum(slot.live.sum() for slot in bank.slots).backward()
    for slot in bank.slots:
        p = bank.logits[slot.logits_index]
        soft = soft_mask(p.detach(), noise(f"k|{slot.spec.name}", 0, p.numel()), 0.5)
        d = (p.grad / (soft * (1 - soft) / 0.5)).view(slot.base.shape) / 0.4
        options = torch.stack([torch.zeros_like(d), slot.deltas[0], slot.deltas[1], slot.deltas[0] + slot.deltas[1]])
        assert float((options - d).abs().min(0).values.max()) < 1e-9
        assert all(bool(((d - o).abs() < 1e-9).any()) for o in options[:3])


def test_noise_is_a_function_of_key_and_index():
    whole = noise("s|1|w", 0, 5000)
    assert torch.equal(whole, noise("s|1|w", 0, 5000))
    for first, count in ((0, 1), (1, 16), (15, 2), (16, 7), (4095, 905)):
        assert torch.equal(noise("s|1|w", first, count), whole[first:first + count])
    assert not torch.equal(whole, noise("s|2|w", 0, 5000))
    u = uniform(whole, torch.float64)
    assert 0 < float(u.min()) < float(u.max()) < 1
    torch.testing.assert_close(uniform(~whole, torch.float64), 1 - u)


def test_noise_is_uniform():
    from scipy.stats import kstest

    assert kstest(uniform(noise("x", 0, 100_000)).numpy(), "uniform").pvalue > 1e-3


def test_the_backward_pass_draws_the_same_mask():
    bank = make_bank(Settings(), 1)
    drawn = [bank._drawn(slot, Draw("k"))[0] for slot in bank.slots]
    again = [bank._drawn(slot, Draw("k"), with_slope=True)[0] for slot in reversed(bank.slots)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, reversed(again), strict=True))
    assert not any(p is not None for p in (slot.live.grad for slot in bank.slots))


def test_soft_draws_are_relaxed_bernoulli():
    logits, temperature = torch.linspace(-2, 2, 9).double(), 0.5
    bits = noise("r", 0, 9)
    u = uniform(bits, torch.float64)
    from torch.distributions.utils import clamp_probs

    want = torch.sigmoid((logits + clamp_probs(u).log() - (-clamp_probs(u)).log1p()) / temperature)
    torch.testing.assert_close(soft_mask(logits, bits, temperature), want)


def test_hard_draws_keep_sigmoid_of_the_logit():
    for logit in (-2.0, 0.0, 1.0):
        share = float(hard_mask(torch.full((200_000,), logit), noise(f"h{logit}", 0, 200_000)).mean())
        keep = 1 / (1 + math.exp(-logit))
        assert abs(share - keep) < 4 * math.sqrt(keep * (1 - keep) / 200_000)
    one, two = (hard_mask(torch.zeros(200_000), noise(key, 0, 200_000)) for key in "ab")
    assert abs(float((one == two).float().mean()) - 0.5) < 0.005


def test_spread_of_untrained_masks():
    """Spec 4.4: a rescaled soft draw multiplies by a factor of standard deviation 0.76, a hard draw by 1.0."""
    bits = noise("sd", 0, 400_000)
    for mask, want in ((soft_mask(torch.zeros(400_000), bits, 0.5), 0.76), (hard_mask(torch.zeros(400_000), bits), 1.0)):
        assert float((mask / mask.mean()).std()) == pytest.approx(want, abs=0.02)


def test_extreme_logits_stay_finite():
    bits = noise("e", 0, 1000)
    for temperature in (0.01, 0.5, 1.0):
        for logit in (-200.0, 200.0):
            mask = soft_mask(torch.full((1000,), logit), bits, temperature)
            assert torch.isfinite(mask).all()
            assert float(mask.mean()) == pytest.approx(float(logit > 0), abs=1e-3)


@pytest.mark.parametrize("rescale", RESCALES)
def test_a_mask_of_zeros_gives_the_aligned_model(rescale):
    """Upstream divides 0 by 0 there."""
    bank = make_bank(Settings(rescale=rescale), 1)
    for p in bank.logits:
        p.data.fill_(-60.0)
    bank.write(Draw("k", hard=True))
    assert all(torch.equal(slot.live.detach(), slot.base) for slot in bank.slots)
    if rescale in ("tensor", "detached"):
        assert bank.zero_masks == len(bank.slots)
    loss_of([slot.live for slot in bank.slots]).backward()
    bank.finish()
    assert all(torch.isfinite(p.grad).all() for p in bank.logits)


def test_rescaled_masks_have_mean_one():
    bank = make_bank(Settings(), 1)
    bank.write(Draw("k"))
    for slot in bank.slots:
        factor = (slot.live.detach() - slot.base) / slot.deltas[0]
        assert float(factor.mean()) == pytest.approx(1, abs=1e-6)
    assert scale_for(0.0) == 1
    assert mean_of(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])) == 0.75


def test_the_unmasked_fusion_and_given_values():
    bank = make_bank(Settings(rule=RULES["task_arithmetic"][0]), 3)
    bank.write_unmasked()
    for slot in bank.slots:
        torch.testing.assert_close(slot.live.detach(), slot.base + 0.3 * sum(slot.raw))
    bank.write_given(lambda spec: torch.full(spec.shape, 2.0))
    assert all((slot.live == 2).all() for slot in bank.slots)
    with pytest.raises(RuntimeError, match="write"):
        loss_of([slot.live for slot in bank.slots]).backward()


def test_a_random_reference_ignores_the_logits():
    first, second = (make_bank(Settings(), 1, spread=spread) for spread in (1.0, 4.0))
    for bank in (first, second):
        bank.write(Draw("r", trained=False))
    assert all(torch.equal(a.live, b.live) for a, b in zip(first.slots, second.slots, strict=True))


def test_prior_gradient_equals_autograd():
    bank = make_bank(Settings(granularity="row"), 1)
    bank.add_prior_gradient(0.3, 2.0)
    logits = [p.detach().clone().requires_grad_(True) for p in bank.logits]
    total, whole = 0, sum(math.prod(shape) for shape in SHAPES.values())
    for s, slot in zip(logits, bank.slots, strict=True):
        p = torch.sigmoid(s)
        kl = p * (p / 0.3).log() + (1 - p) * ((1 - p) / 0.7).log()
        total = total + (kl * (1 if slot.counts is None else slot.counts)).sum() * 2.0 / whole
    total.backward()
    for s, p in zip(logits, bank.logits, strict=True):
        torch.testing.assert_close(p.grad, s.grad, rtol=1e-5, atol=1e-7)
    assert float(prior_gradient(torch.zeros(1), 0.5)) == 0


@pytest.mark.parametrize("granularity", ["element", "row", "block", "head", "layer"])
def test_units_partition_a_tensor(granularity):
    for name, shape in (("x.q_proj.weight", (8, 12)), ("x.o_proj.weight", (12, 8)), ("x.norm.weight", (10,)),
                        ("e", (7, 11))):
        units = units_of(name, shape, granularity, 5, CONFIG)
        labels = units.expand(torch.arange(units.size).double()).expand(units.matrix)
        counts = torch.bincount(labels.reshape(-1).long(), minlength=units.size)
        assert (counts > 0).all()
        assert units.counts is None or torch.equal(units.counts.long(), counts)
        values = torch.rand(units.matrix, dtype=torch.float64)
        want = torch.zeros(units.size, dtype=torch.float64).index_add_(0, labels.reshape(-1).long(), values.reshape(-1))
        torch.testing.assert_close(units.reduce(values), want)


def test_heads_lie_along_outputs_and_inputs():
    assert units_of("l.self_attn.q_proj.weight", (8, 12), "head", 1, CONFIG).grid == (2, 1)
    assert units_of("l.self_attn.o_proj.weight", (12, 8), "head", 1, CONFIG).grid == (1, 2)
    assert units_of("l.mlp.up_proj.weight", (8, 12), "head", 1, CONFIG).grid == (8, 1)


@pytest.mark.parametrize("kind", ["soft", "hard", "expected", "threshold:0.2", "top:0.3", "average:8"])
def test_read_outs(kind):
    logits = {"a": torch.linspace(-2, 2, 50), "b": torch.tensor([0.5, 0.5, 0.5, -1.0])}
    readout = parse_readout(kind)
    one, two, other = (dict(read_out(logits, Settings(), readout, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in logits)
    assert any(not torch.equal(one[k], other[k]) for k in logits) == readout.random
    assert all(((m >= 0) & (m <= 1)).all() for m in one.values())
    flat = torch.cat(list(one.values()))
    if kind == "top:0.3":
        assert int(flat.sum()) == round(0.3 * 54)
    if kind == "threshold:0.2":
        assert torch.equal(one["a"], (logits["a"] > 0.2).float())
    if kind == "expected":
        assert torch.equal(one["a"], torch.sigmoid(logits["a"]))
    assert str(readout) == kind


def test_an_average_of_many_draws_is_close_to_the_expectation_at_temperature_one():
    logits = {"a": torch.linspace(-3, 3, 40)}
    mean = dict(read_out(logits, Settings(temperature=1.0), Readout("average", 2000)))["a"]
    from scipy.integrate import quad

    for i in (0, 20, 39):
        s = float(logits["a"][i])
        want = quad(lambda u, s=s: 1 / (1 + math.exp(-s) * (1 - u) / u), 1e-9, 1 - 1e-9)[0]
        assert float(mean[i]) == pytest.approx(want, abs=0.03)


@pytest.mark.parametrize("text", ["most", "top", "top:0", "top:1.5", "average:0", "average:2.5", "hard:1", "threshold:x"])
def test_bad_read_outs_are_refused(text):
    with pytest.raises(UserError, match="--readout"):
        parse_readout(text)


def test_published_coefficients():
    assert rule_for("ties", 1) == Rule()
    assert rule_for("task_arithmetic", 1) == Rule()
    assert rule_for("dare", 1).lambda_ == 0.3
    assert rule_for("ties", 4).lambda_ == 0.4
    assert rule_for("task_arithmetic", 4, 0.04).lambda_ == 0.04
    assert rule_for("average", 4).lambda_ == 0.25


def test_entropy_in_bits():
    assert entropy(torch.tensor([0.0, -1e4, 1e4])).tolist() == pytest.approx([1, 0, 0])
