"""The packed layer answers as the layer that it is made from, and holds every weight once."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_moe_layer import FFN, HIDDEN, DenseExperts, inputs, layer, tune
from torch import nn

from models.moe import packed
from models.moe.layer import PROJECTIONS
from models.moe.packed import PackedMoe, pack


def folded(*args, dtype=torch.float32, **options):
    moe = tune(layer(*args, **options))
    for linear in (moe.gate_proj, moe.up_proj, moe.down_proj):
        linear.to(dtype)
    for factors in moe.experts.values():
        factors.fold_(dtype)
    return moe


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (3, 2), (3, 3), (12, 2), (12, 5), (12, 12)])
def test_equals_materialised_experts(experts, top_k, tokens, monkeypatch):
    moe, x = folded(experts, top_k), inputs(tokens)
    want = DenseExperts(moe)(x)
    # blocks of a few tokens, the last one short
    monkeypatch.setattr(packed, "_BLOCK", 4 * FFN * top_k)
    assert torch.allclose(PackedMoe(moe)(x), want, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()], ids=str)
def test_any_activation(activation):
    moe, x = folded(3, 2), inputs(9)
    moe.act_fn = activation
    want = DenseExperts(moe)(x)
    assert torch.allclose(PackedMoe(moe)(x), want, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_bfloat16_stays_near_fp32_and_chooses_the_same_experts(top_k):
    x = inputs(40)
    exact, want = folded(3, top_k), DenseExperts(folded(3, top_k))(x.bfloat16().float())
    narrow = PackedMoe(folded(3, top_k, dtype=torch.bfloat16))
    exact.record = narrow.record = True
    exact(x.bfloat16().float())
    got = narrow(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.equal(narrow.probabilities, exact.probabilities)
    assert (got.float() - want).norm() / want.norm() < 0.01


def test_biases_and_quantised_bases_keep_their_products():
    moe, x = folded(3, 2), inputs(9)
    for linear in (moe.gate_proj, moe.up_proj, moe.down_proj):
        linear.bias = nn.Parameter(torch.randn(linear.out_features))
    with torch.no_grad():
        want = moe(x)
    assert torch.allclose(PackedMoe(moe)(x), want, atol=1e-5)

    class Quantised(nn.Linear):
        """Stands for a bitsandbytes layer: no plain matrix."""

    moe = folded(3, 2)
    with torch.no_grad():
        want = moe(x)
    for name in ("gate_proj", "up_proj", "down_proj"):
        held = Quantised(*reversed(getattr(moe, name).weight.shape), bias=False)
        held.weight = getattr(moe, name).weight
        setattr(moe, name, held)
    kept = moe.gate_proj
    made = PackedMoe(moe)
    assert made.gate_proj is kept
    assert torch.allclose(made(x), want, atol=1e-5)


def test_no_weight_is_there_twice():
    model = nn.Sequential(folded(3, 2), folded(3, 2, seed=5))
    x = inputs(9)
    with torch.no_grad():
        want = model(x)
    old = [weakref.ref(getattr(moe, f"{name}_proj").weight) for moe in model for name in PROJECTIONS]
    rank = model[0].experts["gate"].a.shape[1]
    assert torch.allclose(pack(model)(x), want, atol=1e-5)
    assert not any(ref() is not None for ref in old)
    held = sum(t.numel() for t in model.state_dict().values())
    one = 3 * HIDDEN * FFN + 3 * 3 * rank * (HIDDEN + FFN) + 3 * HIDDEN
    assert held == 2 * one
    # three dense experts would be three times the base: here 1.9 at a rank that is a third of the width
    assert held < 2 * (3 * 3 * HIDDEN * FFN)


def test_it_trains_nothing():
    made = PackedMoe(folded(3, 2))
    assert not made(inputs(5)).requires_grad
    assert [name for name, p in made.named_parameters()] == ["router"]
