"""Every merge method against a reference of a few lines that sorts, loops and sees the whole tensor at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.merging.methods import METHODS
from models.operators import blocks as blocks_module
from models.operators import spans as spans_module
from models.operators.blocks import fuse_tensors
from models.operators.dense import karcher_coefficients
from models.operators.noise import uniform
from models.operators.selection import MagnitudeCut, count, find_cuts, magnitude_bits

SHAPE = (23, 37)


@pytest.fixture(params=[1 << 18, 100])
def block_size(request, monkeypatch):
    """Whole tensors, and blocks that cut through rows: results must be the same."""
    monkeypatch.setattr(spans_module, "BLOCK", request.param)
    return request.param


def tensors(n: int, shape=SHAPE, ties: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A base and n experts; with ties, task vectors of few distinct magnitudes, as bf16 gives."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(shape, generator=generator)
    deltas = [0.1 * torch.randn(shape, generator=generator) for _ in range(n)]
    if ties:
        base = torch.zeros(shape)
        deltas = [(d * 30).round() / 8 for d in deltas]
    return base, [base + d for d in deltas]


def fuse(name: str, base: Tensor | None, experts: list[Tensor], **values) -> Tensor:
    row = METHODS[name]
    fields = row.fields()
    given = {fields[k.rstrip("_")].name: v for k, v in values.items()}
    for item in fields.values():
        if item.metadata["each"]:
            value = given.get(item.name, item.default)
            given[item.name] = value if isinstance(value, tuple) else (value,) * len(experts)
    assert all(k.rstrip("_") in fields for k in values)
    return fuse_tensors(row, base, experts, row.parameters(**given), name="layer.weight", seed=5)


def top_mask(values: Tensor, k: int) -> Tensor:
    """The k largest magnitudes, ties to the lowest flat index: a stable sort says which."""
    order = values.abs().flatten().sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view(values.shape)


def elected(deltas: list[Tensor], weights, normalize: bool) -> Tensor:
    stack = torch.stack([d * w for d, w in zip(deltas, weights, strict=True)])
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = torch.sign(stack) == sign
    total = (stack * agree).sum(0)
    shares = sum(a * abs(w) for a, w in zip(agree, weights, strict=True))
    return total / torch.where(shares == 0, 1.0, shares) if normalize else total


def close(one: Tensor, two: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_linear_and_its_normalisation(block_size):
    _, (a, b, c) = tensors(3)
    close(fuse("linear", None, [a, b, c], weight=(1.0, 2.0, 5.0)), (a + 2 * b + 5 * c) / 8)
    close(fuse("linear", None, [a, b], weight=(1.0, -1.0)), a - b)
    close(fuse("linear", None, [a, b], weight=(0.5, 2.0), normalize=False), 0.5 * a + 2 * b)


def test_task_arithmetic_wise_ft_resta(block_size):
    base, (a, b) = tensors(2)
    close(fuse("task_arithmetic", base, [a, b], weight=(0.4, 0.7), lambda_=2.0),
          base + 2 * (0.4 * (a - base) + 0.7 * (b - base)))
    close(fuse("wise_ft", base, [a], alpha=0.3), 0.7 * base + 0.3 * a)
    close(fuse("resta", base, [a, b], gamma=0.5), a + 0.5 * (base - b))


def test_resta_d_drops_the_task_vector_alone(block_size):
    base, (a, b) = tensors(2)
    draws = uniform(5, "layer.weight", 0, 0, base.numel()).view(SHAPE)
    close(fuse("resta", base, [a, b], gamma=0.5, density=0.7), base + (a - base) * (draws < 0.7) / 0.7 + 0.5 * (base - b))


def test_slerp_by_hand():
    # a quarter circle: half way lies the diagonal
    close(fuse("slerp", torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 1.0])], t=0.5),
          torch.tensor([math.sqrt(0.5), math.sqrt(0.5)]))
    third = fuse("slerp", torch.tensor([2.0, 0.0]), [torch.tensor([0.0, 2.0])], t=1 / 3)
    close(third, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


def test_slerp_ends_and_parallel_inputs(block_size):
    base, (a,) = tensors(1)
    far = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    close(fuse("slerp", base, [far], t=0.0), base)
    close(fuse("slerp", base, [far], t=1.0), far)
    close(fuse("slerp", base, [1.01 * base], t=0.25), 1.0025 * base)
    close(fuse("slerp", torch.zeros(3), [torch.ones(3)], t=0.5), torch.full((3,), 0.5))


def test_karcher_of_two_is_slerp_and_of_equal_norms_keeps_the_norm(block_size):
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    a, b, c = (x / x.norm() for x in (a, b, c))
    close(fuse("karcher", None, [a, b], weight=(0.7, 0.3)), fuse("slerp", a, [b], t=0.3), 1e-5)
    mean = fuse("karcher", None, [a, b, c], weight=(1.0, 2.0, 3.0))
    assert abs(float(mean.norm()) - 1) < 1e-5
    # the weighted log-maps at the mean cancel: that is what makes it the Karcher mean
    logs = []
    for x, w in ((a, 1), (b, 2), (c, 3)):
        cosine = float((mean * x).sum())
        angle = math.acos(cosine)
        logs.append(w * angle / math.sin(angle) * (x - cosine * mean))
    assert float(sum(logs).norm()) < 1e-4


def test_karcher_refuses_directions_that_cancel():
    with pytest.raises(ValueError, match="cancel"):
        karcher_coefficients(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64), (1.0, 1.0))


def test_multislerp_is_the_normalised_mean(block_size):
    base, (a, b, c) = tensors(3)
    units = [x / x.norm() for x in (a, b, c)]
    mean = sum(units) / 3
    length = sum(float(x.norm()) for x in (a, b, c)) / 3
    close(fuse("multislerp", None, [a, b, c]), mean / mean.norm() * length, 1e-5)
    deltas = [x - base for x in (a, b)]
    mean = sum(d / d.norm() for d in deltas)
    length = sum(float(d.norm()) for d in deltas) / 2
    close(fuse("multislerp", base, [a, b]), base + mean / mean.norm() * length, 1e-5)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(block_size, filter_wise):
    base, experts = tensors(3)
    flat = torch.stack([(e - base).view(SHAPE[0] if filter_wise else 1, -1) for e in experts]).double()
    unit = flat / flat.norm(dim=-1, keepdim=True)
    pairs = [(unit[i] * unit[j]).sum(-1) for i in range(3) for j in range(i)]
    cosine = torch.stack(pairs).mean(0)
    t = (3 * cosine / (1 + 2 * cosine)).unsqueeze(-1)
    expected = t * flat.mean(0) + base.double().view(flat.shape[1:])
    close(fuse("model_stock", base, experts, filter_wise=filter_wise), expected.float().view(SHAPE), 1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(block_size, ties, normalize):
    base, experts = tensors(3, ties=ties)
    density, weight = (0.2, 0.5, 1.0), (1.0, 0.5, 2.0)
    trimmed = [(e - base) * top_mask(e - base, count(d, base.numel())) for e, d in zip(experts, density, strict=True)]
    assert [int((t != 0).sum()) <= count(d, base.numel()) for t, d in zip(trimmed, density, strict=True)] == [True] * 3
    expected = base + 0.7 * elected(trimmed, weight, normalize)
    close(fuse("ties", base, experts, density=density, weight=weight, normalize=normalize, lambda_=0.7), expected)


def test_ties_by_hand():
    base = torch.zeros(5)
    a = torch.tensor([3.0, -2.0, 1.0, 0.0, 1.0])
    b = torch.tensor([-1.0, -4.0, 2.0, 2.0, 0.0])
    # keep 2 of 5: a -> [3, -2], b -> [-4 at 1, 2 at 2: the first of the tie]; signs: +, -, +; means of those that agree
    close(fuse("ties", base, [a, b], density=0.4), torch.tensor([3.0, -3.0, 2.0, 0.0, 0.0]))


def test_ties_elects_plus_where_the_signs_balance():
    close(fuse("ties", torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])], density=1.0), torch.tensor([2.0]))


def test_a_negative_weight_subtracts_even_where_it_stands_alone():
    base = torch.zeros(2)
    fused = fuse("ties", base, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])], weight=(1.0, -1.0), density=1.0)
    close(fused, torch.tensor([2.0, -3.0]))


def test_dare_matches_its_masks_and_its_mean(block_size):
    base, experts = tensors(2)
    masks = [uniform(5, "layer.weight", i, 0, base.numel()).view(SHAPE) < d for i, d in enumerate((0.3, 0.8))]
    dropped = [(e - base) * m / d for e, m, d in zip(experts, masks, (0.3, 0.8), strict=True)]
    close(fuse("dare_linear", base, experts, density=(0.3, 0.8), weight=(0.5, 0.6)),
          base + 0.5 * dropped[0] + 0.6 * dropped[1])
    close(fuse("dare_ties", base, experts, density=(0.3, 0.8)), base + elected(dropped, (1.0, 1.0), False))
    plain = [d * p for d, p in zip(dropped, (0.3, 0.8), strict=True)]
    close(fuse("dare_linear", base, experts, density=(0.3, 0.8), rescale=False), base + plain[0] + plain[1])


def test_dare_keeps_the_expected_value():
    base = torch.zeros(400, 500)
    fused = fuse("dare_linear", base, [torch.ones_like(base)], density=0.1)
    # mean of 200,000 Bernoulli(0.1) / 0.1: standard error 3 / sqrt(200000) = 0.0067
    assert abs(float(fused.mean()) - 1) < 0.027
    assert set(fused.unique().tolist()) == {0.0, 10.0}


def test_della_ranks_rows(block_size):
    base, experts = tensors(2)
    density, epsilon = (0.5, 0.6), 0.2
    dropped = []
    for i, (expert, d) in enumerate(zip(experts, density, strict=True)):
        delta = expert - base
        rank = delta.abs().argsort(1).argsort(1).float() / (SHAPE[1] - 1)
        keep = d - epsilon + 2 * epsilon * rank
        dropped.append(delta * (uniform(5, "layer.weight", i, 0, base.numel()).view(SHAPE) < keep) / keep)
    close(fuse("della_linear", base, experts, density=density, epsilon=epsilon), base + sum(dropped), 1e-4)
    close(fuse("della", base, experts, density=density, epsilon=epsilon), base + elected(dropped, (1.0, 1.0), True), 1e-4)


def test_della_of_vectors_and_single_columns():
    base = torch.zeros(7)
    assert fuse("della", base, [torch.ones(7)], density=0.5).shape == (7,)
    fused = fuse("della_linear", torch.zeros(1000, 1), [torch.ones(1000, 1)], density=0.5)
    assert set(fused.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.3, 0.0), (0.95, 0.2), (1.0, 0.1)])
def test_breadcrumbs(block_size, density, gamma):
    base, experts = tensors(2, ties=True)
    size = base.numel()
    kept = count(density, size)
    top = min(int(gamma * size + 1e-6), size - kept)
    masked = [(e - base) * (top_mask(e - base, top + kept) & ~top_mask(e - base, top)) for e in experts]
    close(fuse("breadcrumbs", base, experts, density=density, gamma=gamma, weight=(0.5, 2.0)),
          base + 0.5 * masked[0] + 2 * masked[1])
    close(fuse("breadcrumbs_ties", base, experts, density=density, gamma=gamma), base + elected(masked, (1.0, 1.0), False))


def test_breadcrumbs_without_outliers_keeps_everything():
    base, experts = tensors(1)
    close(fuse("breadcrumbs", base, experts, density=1.0, gamma=0.0), experts[0])


@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_sce(block_size, topk):
    base, experts = tensors(3)
    deltas = torch.stack([e - base for e in experts])
    variance = deltas.var(0, unbiased=False)
    if topk < 1:
        deltas = deltas * top_mask(variance, int(topk * int((variance > 0).sum())))
    energy = deltas.pow(2).sum((1, 2))
    weights = (energy / energy.sum()).tolist()
    agree = torch.sign(deltas) == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    shares = sum(a * w for a, w in zip(agree, weights, strict=True))
    mixed = sum(d * a * w for d, a, w in zip(deltas, agree, weights, strict=True)) / torch.where(shares == 0, 1.0, shares)
    close(fuse("sce", base, experts, select_topk=topk), base + mixed, 1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_empty_tensors_scalars_and_16_bit_inputs(name):
    row = METHODS[name]
    need = {k: 0.5 for k, f in row.fields().items() if f.default is None}
    for shape in ((0,), (3, 0), (1,), (2, 3)):
        for dtype in (torch.bfloat16, torch.float16):
            base = None if row.base == "no" else torch.ones(shape, dtype=dtype)
            inputs = [torch.full(shape, 1.5 + i, dtype=dtype) for i in range(row.inputs[0])]
            fused = fuse(name, base, inputs, **need)
            assert fused.shape == shape
            assert fused.dtype == torch.float32
            assert torch.isfinite(fused).all()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"passthrough"}))
def test_inputs_are_left_alone(name):
    row = METHODS[name]
    base, experts = tensors(2)
    before = [t.clone() for t in (base, *experts)]
    need = {k: 0.5 for k, f in row.fields().items() if f.default is None}
    fuse(name, None if row.base == "no" else base, experts[:row.inputs[1]], **need)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


def test_draws_depend_on_seed_input_tensor_and_index_alone():
    whole = uniform(1, "a", 0, 0, 1000)
    assert torch.equal(uniform(1, "a", 0, 137, 400), whole[137:537])
    others = [uniform(2, "a", 0, 0, 1000), uniform(1, "b", 0, 0, 1000), uniform(1, "a", 1, 0, 1000)]
    assert all(float((whole - other).abs().mean()) > 0.2 for other in others)
    assert abs(float(whole.mean()) - 0.5) < 0.04


@pytest.mark.parametrize("size", [1, 1000])
def test_cuts_are_exact_for_every_k(size):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(size, generator=generator) * 4).round() / 4
    for k in (0, 1, 2, size // 3, size - 1, size):
        k = min(k, size)
        ((cut,),) = find_cuts(lambda: ([part] for part in values.split(97)), [[k]], size)
        fresh = cut.fresh()
        mask = torch.cat([fresh.mask(part) for part in values.split(97)])
        assert torch.equal(mask, top_mask(values, k))
        fresh = cut.fresh()
        kept = torch.cat([fresh.keep(part.clone()) for part in values.split(97)])
        assert torch.equal(kept, values * mask)


def test_cut_counts_its_ties_over_blocks():
    cut = MagnitudeCut(int(magnitude_bits(torch.tensor([1.0]))), 3).fresh()
    masks = [cut.mask(torch.tensor([1.0, -1.0, 0.5, 2.0])) for _ in range(3)]
    assert [m.tolist() for m in masks] == [[True, True, False, True], [True, False, False, True],
                                           [False, False, False, True]]


def test_count_is_exact_where_floats_are_not():
    assert count(0.29, 100) == 29
    assert count(0.0, 100) == 0
    assert count(1e-9, 100) == 1
    assert count(1.0, 7) == 7
    assert blocks_module.uniform(0, "x", 0, 0, 0).numel() == 0
