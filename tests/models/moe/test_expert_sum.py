"""The hand-written gradient of the expert sum against finite differences and against a naive loop."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.moe.expert_sum import ExpertInputs, SumOptions, expert_sum

TOKENS, HIDDEN, RANK, DOWN_RANK = 5, 4, 2, 3
CASES = list(itertools.product(("none", "all", "some"), (1, 2, 3)))


def make(tokens=TOKENS, f=HIDDEN, experts=3, top_k=2, seed=0, dtype=torch.float64):
    """Inputs of the expert sum; the weights of the chosen experts, and where they go."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    tensors = [draw(tokens, f), draw(tokens, f), draw(tokens, 2, experts, RANK), draw(experts, f, RANK),
               draw(experts, f, RANK), draw(experts, DOWN_RANK, f)]
    kept = torch.rand(tokens, top_k, generator=generator, dtype=dtype).add(0.1).requires_grad_()
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    mask = (torch.rand(tokens, f, generator=generator) > 0.4).to(dtype) / 0.6
    return tensors, kept, chosen, mask


def scattered(kept, chosen, experts):
    return kept.new_zeros(len(kept), experts).scatter(1, chosen, kept)


def ours(tensors, kept, chosen, act, mask, start, frozen=0, frozen_down=0):
    gate, up, inner, gate_b, up_b, down_a = tensors
    return expert_sum(ExpertInputs(gate, up, inner, kept, gate_b, up_b, down_a), chosen,
                      SumOptions(act, mask, start, frozen, frozen_down))


def naive(tensors, weights, act, mask, start):
    """sum_e w_e h_e and A_e (w_e h_e), token by token and expert by expert."""
    gate, up, inner, gate_b, up_b, down_a = tensors
    totals, shrunk = [], []
    for t in range(len(gate)):
        total, rows = torch.zeros_like(gate[t]), []
        for e in range(weights.shape[1]):
            h = act(gate[t] + gate_b[e] @ inner[t, 0, e]) * (up[t] + up_b[e] @ inner[t, 1, e]) * weights[t, e]
            total = total + h
            dropped = h if mask is None else h * mask[t]
            rows.append(torch.cat([down_a[e][:start] @ h, down_a[e][start:] @ dropped]))
        totals.append(total)
        shrunk.append(torch.stack(rows))
    return torch.stack(totals), torch.stack(shrunk)


def masks(kind, mask):
    """(mask, dropped_from): no dropout, dropout of every row of A, of the last ones only."""
    return {"none": (None, 0), "all": (mask, 0), "some": (mask, 1)}[kind]


@pytest.mark.parametrize(("kind", "top_k"), CASES)
def test_gradcheck(kind, top_k):
    tensors, kept, chosen, mask = make(top_k=top_k)
    mask, start = masks(kind, mask)

    def function(kept, *tensors):
        return ours(tensors, kept, chosen, F.silu, mask, start)

    assert torch.autograd.gradcheck(function, (kept, *tensors), fast_mode=False)


@pytest.mark.parametrize("act", [F.gelu, torch.tanh, nn.SiLU()], ids=["gelu", "tanh", "SiLU"])
def test_gradcheck_of_other_activations(act):
    tensors, kept, chosen, mask = make(tokens=3)
    assert torch.autograd.gradcheck(
        lambda kept, *t: ours(t, kept, chosen, act, mask, 1), (kept, *tensors))


@pytest.mark.parametrize(("kind", "top_k"), CASES)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (7, 3), (40, 12)])
def test_equals_the_naive_loop_forward_and_backward(tokens, experts, kind, top_k):
    tensors, kept, chosen, mask = make(tokens, 6, experts, top_k, seed=3)
    mask, start = masks(kind, mask)
    inputs = (kept, *tensors)
    got = ours(tensors, kept, chosen, F.silu, mask, start)
    want = naive(tensors, scattered(kept, chosen, experts), F.silu, mask, start)
    directions = [torch.randn(w.shape, generator=torch.Generator().manual_seed(9), dtype=w.dtype) for w in want]
    for one, two in zip(got, want, strict=True):
        assert torch.allclose(one, two, atol=1e-12)
    for one, two in zip(torch.autograd.grad(got, inputs, directions), torch.autograd.grad(want, inputs, directions),
                        strict=True):
        assert torch.allclose(one, two, atol=1e-11)


@pytest.mark.parametrize("experts", [2, 3, 12])
@pytest.mark.parametrize("dropout", [False, True])
def test_at_most_four_tensors_of_all_tokens_are_kept(experts, dropout):
    tokens, f = 11, 7
    tensors, kept, chosen, mask = make(tokens, f, experts)
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(tensors, kept, chosen, F.silu, mask if dropout else None, 1)
    # gate and up, and the dropout mask where there is one
    assert list(sizes.values()).count((tokens, f)) == 2 + dropout


def test_gradient_of_one_output_alone():
    tensors, kept, chosen, _ = make()
    for i in range(2):
        got = torch.autograd.grad(ours(tensors, kept, chosen, F.silu, None, 0)[i].sum(), kept)
        want = torch.autograd.grad(naive(tensors, scattered(kept, chosen, 3), F.silu, None, 0)[i].sum(), kept)
        assert torch.allclose(got[0], want[0])


def test_an_expert_that_no_token_chose():
    tensors, kept, _, _ = make(top_k=1)
    total, shrunk = ours(tensors, kept, torch.ones(TOKENS, 1, dtype=torch.long), F.silu, None, 0)
    (total.sum() + shrunk.sum()).backward()
    assert (shrunk[:, 0] == 0).all()
    for tensor in tensors[3:]:
        assert (tensor.grad[[0, 2]] == 0).all()
        assert (tensor.grad[1] != 0).any()


@pytest.mark.parametrize(("frozen", "frozen_down"), [(1, 2), (2, 3), (0, 1)])
@pytest.mark.parametrize("kind", ["none", "all", "some"])
def test_what_is_frozen_gets_a_gradient_of_0_and_changes_no_other(kind, frozen, frozen_down):
    tensors, kept, chosen, mask = make(seed=7)
    mask, start = masks(kind, mask)
    whole, part = (torch.autograd.grad([t.sum() for t in ours(tensors, kept, chosen, F.silu, mask, start, *cut)],
                                       (kept, *tensors)) for cut in ((), (frozen, frozen_down)))
    for one, two in zip(whole[:4], part[:4], strict=True):
        assert torch.equal(one, two)
    for one, two, cut, side in zip(whole[4:], part[4:], (frozen, frozen, frozen_down), (2, 2, 1), strict=True):
        wanted = one.clone()
        wanted.narrow(side, 0, cut).zero_()
        torch.testing.assert_close(two, wanted, atol=1e-12, rtol=1e-12)


def test_inputs_are_not_written_to():
    tensors, kept, chosen, mask = make()
    before = [t.detach().clone() for t in (*tensors, kept, mask)]
    total, shrunk = ours(tensors, kept, chosen, F.silu, mask, 1)
    (total.sum() + shrunk.sum()).backward()
    for one, two in zip(before, (*tensors, kept, mask), strict=True):
        assert torch.equal(one, two.detach())


@pytest.mark.parametrize("top_k", [2, 24])
def test_bfloat16_accumulates_in_fp32(top_k):
    """Experts that nearly cancel: a running sum in bfloat16 would lose the small ones."""
    experts, tokens, f = 24, 40, 8
    tensors, _, _, _ = make(tokens, f, experts, seed=5, dtype=torch.float32)
    gate, up, inner, gate_b, up_b, down_a = (t.detach().bfloat16() for t in tensors)
    chosen = torch.arange(top_k).expand(tokens, top_k)
    weights = torch.full((tokens, top_k), 1 / top_k)
    total, _ = expert_sum(ExpertInputs(gate, up, inner, weights, gate_b, up_b, down_a), chosen, SumOptions(F.silu))
    terms = []
    for e in range(top_k):
        h = F.silu(torch.addmm(gate, inner[:, 0, e], gate_b[e].mT)) * torch.addmm(up, inner[:, 1, e], up_b[e].mT)
        terms.append(h * weights[:, e].bfloat16()[:, None])
    wide = torch.stack(terms).float().sum(0)
    narrow = torch.zeros_like(terms[0])
    for term in terms:
        narrow = narrow + term
    assert total.dtype == torch.bfloat16
    ulp = wide.abs().bfloat16().float() * 2**-8 + 1e-6
    assert ((total.float() - wide).abs() <= ulp).all()
    # of two terms a narrow sum rounds once, too
    assert ((narrow.float() - wide).abs() <= ulp).all() == (top_k == 2)
