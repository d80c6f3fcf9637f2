"""A mask parted by rows: each process draws and trains its rows of what one would; and what cannot be parted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from errors import UserError
from models.base.parted import own_part
from models.checkpoints.parts import in_shape_of
from models.mask.bank import Draw, MaskBank, make_slot
from models.mask.optimiser import RoundedAdamW
from models.mask.settings import Rule, Settings
from models.mask.slots import Spec
from models.mask.units import units_of
from training.mask_model import check_parting

#: Seven rows: the first of two processes has four of them, the second three.
SHAPE = (7, 12)


# one place for all tests: torch remembers the parts of the first
@pytest.fixture(scope="module")
def mesh():
    """Two processes, of which this is the second; what they send round never arrives."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def bank_of(settings, mesh=None, dtype=torch.float32):
    source = torch.Generator().manual_seed(3)
    base, *deltas = (torch.randn(SHAPE, generator=source) for _ in range(3))
    live = torch.nn.Parameter(parted(torch.zeros(SHAPE), mesh) if mesh else torch.zeros(SHAPE))
    spec = Spec("w", "w", "weight", SHAPE, units_of("w", SHAPE, settings.granularity, 5, {}))
    bank = MaskBank([make_slot(spec, live, base, deltas, settings)], settings, logit_dtype=dtype)
    bank.load_logits({"w": torch.randn(spec.units.size, generator=source)})
    return bank


def parted(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def rows_of(tensor, mesh):
    return own_part(parted(tensor.detach().reshape(SHAPE[0], -1), mesh))


@pytest.mark.parametrize("granularity", ["element", "row", "block"])
@pytest.mark.parametrize("rule", [Rule("task_arithmetic", 0.3), Rule("dare", 0.3, drop=0.4)], ids=lambda rule: rule.name)
def test_each_process_has_its_rows_of_one_mask(mesh, rule, granularity):
    # the sums of any other scale would have to arrive
    settings = Settings(rule=rule, granularity=granularity, rescale="none")
    whole, mine = bank_of(settings), bank_of(settings, mesh)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    for bank, given in ((whole, gradient), (mine, parted(gradient.clone(), mesh))):
        (slot,) = bank.slots
        bank.write(Draw("k"))
        slot.live.grad = given.clone()
        bank._backward(slot, slot.live)
        bank.add_prior_gradient(0.3, 2.0)
        assert slot.live.grad is None
    (alone,), (shared,) = whole.slots, mine.slots
    assert torch.equal(shared.weights, rows_of(alone.live, mesh))
    assert shared.entries == alone.entries == 84
    torch.testing.assert_close(own_part(mine.logits[0].grad), rows_of(whole.logits[0].grad, mesh))
    assert isinstance(mine.logits[0].grad, DTensor)
    assert mine.logits[0].grad.shape == mine.logits[0].shape == (7, whole.logits[0].numel() // 7)
    assert [tensor.shape for tensor in shared.deltas] == [shared.weights.shape] * (1 if rule.linear else 2)


def test_given_values_are_cut_to_the_rows_that_lie_here(mesh):
    bank, value = bank_of(Settings(), mesh), torch.arange(84.0).view(SHAPE)
    bank.write_given(lambda spec: value)
    assert torch.equal(bank.slots[0].weights, rows_of(value, mesh))


def test_a_rounded_step_moves_the_rows_that_lie_here(mesh):
    bank = bank_of(Settings(), mesh, torch.bfloat16)
    (logits,) = bank.logits
    before = own_part(logits).clone()
    logits.grad = parted(torch.ones(logits.shape, dtype=torch.bfloat16), mesh)
    RoundedAdamW([logits], lr=0.5).step()
    moved = (before - own_part(logits)).detach().float()
    assert moved.shape[0] == own_part(logits).shape[0] > 0
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), atol=0.02, rtol=0)


def test_moments_go_from_flat_to_rows_and_back(mesh):
    flat = torch.arange(84.0)
    rows = in_shape_of(flat, torch.nn.Parameter(parted(torch.zeros(SHAPE), mesh)))
    assert torch.equal(own_part(rows), rows_of(flat, mesh))
    assert torch.equal(in_shape_of(flat.view(SHAPE), torch.nn.Parameter(torch.zeros(84))), flat)
    # counts of steps, and what is as its parameter is
    assert in_shape_of(step := torch.tensor(3.0), torch.nn.Parameter(torch.zeros(1))) is step
    assert in_shape_of(flat, torch.nn.Parameter(torch.zeros(84))) is flat
    assert in_shape_of(flat, None) is flat


@pytest.mark.parametrize(("settings", "shape", "message"), [
    (Settings(rule=Rule("ties", 0.4)), (8, 4), "--merge_rule ties: its cuts are ranks in a whole task vector"),
    (Settings(granularity="layer"), (8, 4), "--granularity layer: rows of w share a logit"),
    (Settings(granularity="block"), (8,), "--granularity block: rows of w share .* or block with --mask_exclude norms"),
    (Settings(), (3, 8), "4 processes: FSDP2 parts tensors by rows, and w has 3; start fewer, or start with")])
def test_what_cannot_be_parted_says_what_can(settings, shape, message):
    spec = Spec("w", "w", "weight", shape, units_of("w", shape, settings.granularity, 4, {}))
    with pytest.raises(UserError, match=message):
        check_parting(settings, [spec], 4)
    check_parting(Settings(), [Spec("w", "w", "weight", (8, 4), units_of("w", (8, 4), "element", 4, {}))], 4)
