"""The methods that mergekit 0.1.5 has beside the papers': each against a reference of a few lines on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_methods import SHAPE, close, fuse, tensors, top_mask

from models.operators import pairwise as pairwise_module
from models.operators import spans as spans_module
from models.operators.blocks import Undefined
from models.operators.selection import count


@pytest.fixture(params=[1 << 18, 100], autouse=True)
def block_size(request, monkeypatch):
    monkeypatch.setattr(spans_module, "BLOCK", request.param)
    monkeypatch.setattr(pairwise_module, "BLOCK", request.param)


def arc(a, b, t, dim):
    """SLERP of the vectors along ``dim``, in double."""
    a, b = a.double(), b.double()
    cosine = ((a * b).sum(dim, keepdim=True) / (a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True)))
    angle = cosine.acos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("flags", "dim"), [({}, None), ({"nuslerp_flatten": False}, 1),
                                            ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0)])
def test_nuslerp(based, flags, dim):
    base, (a, b) = tensors(2)
    x, y = (a - base, b - base) if based else (a, b)
    expected = arc(x.flatten(), y.flatten(), 0.75, 0).view(SHAPE) if dim is None else arc(x, y, 0.75, dim)
    found = fuse("nuslerp", base if based else None, [a, b], weight=(0.2, 0.6), **flags)
    close(found, (expected + (base if based else 0)).float(), 1e-5)


def test_nuslerp_of_opposite_zero_and_equal_vectors():
    a = torch.tensor([1.0, 2.0])
    close(fuse("nuslerp", None, [a, -a], weight=(1.0, 3.0)), -0.5 * a)
    close(fuse("nuslerp", None, [a, a], weight=(1.0, 3.0)), a)
    # a vector without a direction stands at a right angle to every other, as in mergekit
    close(fuse("nuslerp", None, [torch.zeros(2), a], weight=(1.0, 1.0)), math.sin(math.pi / 4) * a)
    # weights that cancel mean half way
    close(fuse("nuslerp", None, [a, 3 * a], weight=(1.0, -1.0)), 2 * a)


def test_nearswap_by_hand():
    base, a = torch.zeros(4), torch.tensor([0.05, -0.1, 0.4, 0.0])
    close(fuse("nearswap", base, [a], t=0.1), torch.tensor([0.05, -0.1, 0.1, 0.0]))


def test_arcee_fusion():
    base, (a,) = tensors(1)
    p, q = ((x.double().softmax(-1) + 1e-8) for x in (a, base))
    scores = ((a - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)).float()
    ordered = scores.flatten().sort().values
    q1, median, q3 = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    keep = scores >= median + 1.5 * (q3 - q1)
    assert 0 < int(keep.sum()) < 0.2 * a.numel()
    close(fuse("arcee_fusion", base, [a]), torch.where(keep, a, base))


def test_arcee_fusion_of_equal_models_is_the_model():
    base, _ = tensors(1)
    assert torch.equal(fuse("arcee_fusion", base, [base]), base)


@pytest.mark.parametrize("plus", [False, True])
def test_ram(plus):
    base, experts = tensors(3, ties=True)
    deltas = torch.stack([e - base for e in experts])
    touched = deltas.abs() > 0.2
    sharers = touched.sum(0)
    factors = torch.ones(3)
    if plus:
        shared, alone = ((touched & m).sum((1, 2)) for m in (sharers > 1, sharers == 1))
        factors = 1 + 0.5 * (shared / alone).clamp(max=1.5)
    own = (deltas * (touched & (sharers == 1)) * factors.view(3, 1, 1)).sum(0)
    mean = (deltas * (touched & (sharers > 1))).sum(0) / sharers.clamp(min=1)
    found = fuse("ramplus_tl", base, experts, epsilon=0.2, r=0.5, alpha=1.5) if plus else \
        fuse("ram", base, experts, epsilon=0.2)
    close(found, base + own + mean, 1e-5)


def test_ram_by_hand():
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([3.0, 0.0, -1.0, 1e-6])
    close(fuse("ram", base, [a, b]), torch.tensor([2.0, 2.0, -1.0, 0.0]))
    # each shares one entry and has one alone: 1 + r min(1, alpha)
    close(fuse("ramplus_tl", base, [a, b]), torch.tensor([2.0, 2.04, -1.02, 0.0]))
    # what an input shares only leaves nothing to scale
    close(fuse("ramplus_tl", base, [a, a]), a)


def test_ties_and_breadcrumbs_rescale_to_the_l1_norm():
    base, experts = tensors(2)
    deltas = [e - base for e in experts]
    trimmed = [d * top_mask(d, count(0.3, d.numel())) for d in deltas]
    scaled = [t * d.abs().sum() / t.abs().sum() for t, d in zip(trimmed, deltas, strict=True)]
    stack = torch.stack(scaled)
    agree = torch.sign(stack) == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    close(fuse("ties", base, experts, density=0.3, rescale=True, normalize=False), base + (stack * agree).sum(0), 1e-5)
    top = int(0.1 * base.numel() + 1e-6)
    crumbs = [d * (top_mask(d, top + count(0.3, d.numel())) & ~top_mask(d, top)) for d in deltas]
    expected = base + sum(c * d.abs().sum() / c.abs().sum() for c, d in zip(crumbs, deltas, strict=True))
    close(fuse("breadcrumbs", base, experts, density=0.3, gamma=0.1, rescale=True), expected, 1e-5)
    close(fuse("ties", base, [base, base], density=0.3, rescale=True), base)


def test_passthrough_scales():
    _, (a,) = tensors(1)
    close(fuse("passthrough", None, [a], scale=0.25), a / 4)


def test_multislerp_weights_as_they_are_and_what_has_no_direction():
    a, b, c = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.zeros(2)
    mean = torch.tensor([0.2, 0.6]) / math.hypot(0.2, 0.6)
    close(fuse("multislerp", None, [a, b], weight=(0.2, 0.6), normalize_weights=False), mean * (0.2 * 3 + 0.6 * 4))
    close(fuse("multislerp", None, [a, b], weight=(0.2, 0.6)), mean * (0.2 * 3 + 0.6 * 4) / 0.8)
    # an input of zeros lowers the mean norm and leaves the direction
    close(fuse("multislerp", None, [a, c], weight=(1.0, 1.0)), a / 2)
    close(fuse("multislerp", None, [a, -a], weight=(1.0, 1.0)), torch.zeros(2))
    with pytest.raises(Undefined, match="cancel"):
        fuse("multislerp", None, [a, -a / 2, -a / 2], weight=(1.0, 0.5, 0.5))


def test_karcher_stops_when_told_and_leaves_zeros_out():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    exact = fuse("karcher", None, [a, b])
    close(fuse("karcher", None, [a, b], max_iter=10, tol=1e-5), exact, 1e-4)
    close(fuse("karcher", None, [a, b, torch.zeros(SHAPE)]), exact * 2 / 3, 1e-5)
