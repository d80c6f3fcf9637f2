"""The fused layer against dense experts: same function, gradients, tuning, dropout, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.adapters.files import read_adapter
from models.base.families import FAMILIES
from models.llama_moe import stack_experts
from models.moe.files import install, moe_layers
from models.moe.layer import PROJECTIONS, SharedMoe, TuningConfig
from models.moe.router import route

HIDDEN, FFN, RANK = 16, 24, 3
TUNING = TuningConfig(r=2, alpha=3.0)
OBJECTIVES = ("helpfulness", "safety", "truthfulness")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def factors_of(experts, hidden=HIDDEN, ffn=FFN, rank=RANK, seed=0, equal=False, scale=0.3):
    """projection -> (a, b) with random values; ``equal`` repeats the first expert."""
    shapes = {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
    drawn, source = {}, generator(seed)
    for name, (inputs, outputs) in shapes.items():
        a = torch.randn(experts, rank, inputs, generator=source)
        b = torch.randn(experts, outputs, rank, generator=source)
        if equal:
            a, b = a[:1].expand_as(a), b[:1].expand_as(b)
        drawn[name] = (a * scale, b * scale)
    return drawn


def layer(experts=3, top_k=2, seed=0, router=None, **options) -> SharedMoe:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [nn.Linear(*shape, bias=False) for shape in ((HIDDEN, FFN), (HIDDEN, FFN), (FFN, HIDDEN))]
    router = torch.randn(experts, HIDDEN, generator=generator(seed + 1)) if router is None else router
    return SharedMoe(*parts, nn.SiLU(), factors_of(experts, seed=seed, **options), router, top_k).eval()


def inputs(tokens=7, seed=3, hidden=HIDDEN):
    return torch.randn(2, tokens, hidden, generator=generator(seed))


class DenseExperts(nn.Module):
    """The textbook MoE: one dense FFN per expert, made of ``materialise``, summed with the router's weights."""

    def __init__(self, moe: SharedMoe) -> None:
        super().__init__()
        self.router, self.top_k, self.act = moe.router.detach().clone(), moe.top_k, moe.act_fn
        self.weights = [{k: v.detach() for k, v in moe.materialise(e).items()} for e in range(moe.num_experts)]

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        _, kept, chosen = route(x @ self.router.T, self.top_k)
        outputs = torch.stack([
            F.linear(self.act(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"]) for w in self.weights])
        picked = outputs.gather(0, chosen.T[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * kept.T[..., None]).sum(0).view_as(hidden)


def tune(moe, tuning=TUNING, seed=9):
    """Add second-stage factors and move them away from their start."""
    moe.add_tuning(tuning, generator(seed))
    with torch.no_grad():
        for name in PROJECTIONS:
            moe.experts[name].tuned_b.normal_(0, 0.3, generator=generator(seed + 1))
    return moe


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (12, 1), (12, 2), (12, 12)])
def test_equals_materialised_experts(experts, top_k, tokens, tuned):
    moe = layer(experts, top_k)
    if tuned:
        tune(moe)
    x = inputs(tokens)
    assert torch.allclose(moe(x), DenseExperts(moe)(x), atol=1e-5)


@pytest.mark.parametrize("experts", [2, 3, 12])
def test_all_of_equal_experts_is_the_dense_ffn(experts):
    moe = layer(experts, experts, equal=True)
    w, x = moe.materialise(0), inputs()
    dense = F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])
    assert torch.allclose(moe(x), dense, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_zero_factors_give_the_base_ffn(top_k):
    moe, x = layer(3, top_k, scale=0.0), inputs()
    base = moe.down_proj(F.silu(moe.gate_proj(x)) * moe.up_proj(x))
    assert torch.allclose(moe(x), base, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 2), (12, 4)])
def test_factored_logits_equal_materialised_logits(layers, experts, top_k):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128)).eval()
    factors = [factors_of(experts, 32, 64, seed=i) for i in range(layers)]
    routers = [torch.randn(experts, 32, generator=generator(i)) for i in range(layers)]
    install(model, factors, routers, top_k)
    assert len(moe_layers(model)) == layers
    dense = copy.deepcopy(model)
    for block in dense.model.layers:
        block.mlp = DenseExperts(block.mlp)
    ids = torch.randint(0, 64, (2, 30), generator=generator(4))
    with torch.no_grad():
        one, two = model(ids).logits, dense(ids).logits
    assert one.std() > 0.05
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("expert", range(3))
def test_forced_router_equals_that_adapters_peft_model(adapters, pico, expert):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32),
                                       adapters / "outputs" / OBJECTIVES[expert]).merge_and_unload()
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    stacked = stack_experts([read_adapter(adapters / "outputs" / name) for name in OBJECTIVES], FAMILIES["llama"], 2)
    # without a bias, a router is forced through a coordinate that every token shares
    router = torch.zeros(3, 32)
    router[expert, 0] = 50.0
    install(base, stacked, [router, router], 1)
    x = inputs(40, hidden=32)
    x[..., 0] = 1.0
    for fused, aligned in zip(base.model.layers, merged.model.layers, strict=True):
        with torch.no_grad():
            assert torch.allclose(fused.mlp(x), aligned.mlp(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(3, 2, 7), (3, 1, 40), (12, 2, 40), (3, 3, 7)])
def test_gradients_equal_those_of_materialised_experts(experts, top_k, tokens, tuned):
    moe = tune(layer(experts, top_k)) if tuned else layer(experts, top_k)
    moe.double()
    # the router computes in fp32 by design, so gradients agree to fp32
    moe.router.data = moe.router.data.float()
    x = inputs(tokens).double().requires_grad_()
    (moe(x) ** 2).sum().backward()
    router, mine = moe.router.grad.clone(), x.grad.clone()
    moe.router.grad = x.grad = None
    flat = x.reshape(-1, HIDDEN)
    _, kept, chosen = route(flat.float() @ moe.router.T, top_k)
    share = torch.zeros(len(flat), experts, dtype=torch.double).scatter(1, chosen, kept.double())
    total = 0.0
    for e in range(experts):
        w = {k: getattr(moe, f"{k}_proj").weight + moe.experts[k].factors(torch.double)[1][e]
             @ moe.experts[k].factors(torch.double)[0][e] for k in PROJECTIONS}
        h = F.silu(flat @ w["gate"].T) * (flat @ w["up"].T)
        total = total + share[:, e, None] * (h @ w["down"].T)
    named = {n: p.grad.clone() for n, p in moe.named_parameters() if "tuned_" in n}
    moe.zero_grad()
    (total**2).sum().backward()
    assert torch.allclose(mine, x.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(router, moe.router.grad, rtol=1e-3, atol=1e-4)
    for name, gradient in named.items():
        assert torch.allclose(gradient, moe.get_parameter(name).grad, rtol=1e-3, atol=1e-4), name
    assert len(named) == (6 if tuned else 0)


@pytest.mark.parametrize("top_k", [2, 3])
def test_router_gets_a_gradient(top_k):
    moe = layer(3, top_k)
    (moe(inputs()) ** 2).sum().backward()
    assert (moe.router.grad.norm(dim=1) > 1e-4).all()


def test_gate_loss_alone_reaches_the_router():
    from models.moe.router import gate_loss, mean_probabilities

    moe = layer(3, 1)
    moe.record = True
    moe(inputs())
    means = mean_probabilities([moe.probabilities], torch.ones(2, 7))
    gate_loss(means, torch.tensor([0, 2])).sum().backward()
    assert (moe.router.grad.norm(dim=1) > 1e-4).all()


def test_recorded_probabilities_have_the_shape_of_the_input_and_only_on_demand():
    moe, x = layer(), inputs()
    moe(x)
    assert moe.probabilities is None
    moe.record = True
    moe(x)
    assert moe.probabilities.shape == (2, 7, 3)
    assert torch.allclose(moe.probabilities, F.linear(x, moe.router).softmax(-1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adding_tuning_leaves_the_function_unchanged(training, dropout):
    moe, x = layer(), inputs(40)
    want = moe(x)
    moe.add_tuning(TuningConfig(2, 3.0, dropout), generator())
    moe.train(training)
    assert torch.allclose(moe(x), want, atol=1e-6)
    for name in PROJECTIONS:
        assert (moe.experts[name].change_norms() == 0).all()
        a = moe.experts[name].tuned_a
        assert a.abs().max() <= a.shape[2] ** -0.5
        assert a.std() > 0.3 * a.shape[2] ** -0.5


def test_tuning_trains_and_the_aligned_factors_do_not():
    moe = layer()
    moe.add_tuning(TUNING, generator())
    (moe(inputs()) ** 2).sum().backward()
    for name in PROJECTIONS:
        assert (moe.experts[name].tuned_b.grad.flatten(1).norm(dim=1) > 0).all()
        assert not moe.experts[name].a.requires_grad
        assert not moe.experts[name].b.requires_grad


def test_change_norm_is_the_norm_of_the_materialised_difference():
    plain, moe = layer(), tune(layer())
    for e in range(3):
        before, after = plain.materialise(e), moe.materialise(e)
        for name in PROJECTIONS:
            want = (after[name] - before[name]).norm()
            assert torch.allclose(moe.experts[name].change_norms()[e], want, rtol=1e-4)


def test_folding_keeps_the_function_bit_for_bit():
    moe, x = tune(layer()), inputs()
    want = moe(x)
    for factors in moe.experts.values():
        factors.fold_(torch.float32)
    assert torch.equal(moe(x), want)
    assert not [n for n, _ in moe.named_parameters() if "tuned_" in n]


def test_dropout_does_not_reach_the_aligned_factors():
    moe, x = tune(layer(), TuningConfig(2, 3.0, dropout=0.5)), inputs(40)
    with torch.no_grad():
        for name in PROJECTIONS:
            moe.experts[name].tuned_a.zero_()
    want = moe(x)
    moe.train()
    for _ in range(3):
        assert torch.allclose(moe(x), want, atol=1e-6)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_dropout_reaches_every_tuned_factor_in_training_only(name):
    moe, x = tune(layer(), TuningConfig(2, 3.0, dropout=0.5)), inputs()
    with torch.no_grad():
        for other in PROJECTIONS:
            if other != name:
                moe.experts[other].tuned_b.zero_()
    assert torch.equal(moe(x), moe(x))
    moe.train()
    assert not torch.allclose(moe(x), moe(x), atol=1e-4)


def test_dropout_keeps_the_mean():
    """The change of the down projection is linear in the mask, so its average over many masks is the plain change."""
    moe = tune(layer(), TuningConfig(2, 3.0, dropout=0.3))
    with torch.no_grad():
        for other in ("gate", "up"):
            moe.experts[other].tuned_b.zero_()
    x = inputs(1)[:1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        want = moe(x)[0, 0]
        got = moe.train()(x.expand(1, 20000, -1))[0]
    error = (got.mean(0) - want).abs()
    assert (error < 5 * got.std(0) / 20000**0.5 + 1e-5).all()
    assert got.std() > 1e-3


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (3, 2), (12, 2)])
def test_one_token_and_many_tokens_agree(experts, top_k):
    moe, x = tune(layer(experts, top_k)), inputs(50)
    together = moe(x)
    alone = torch.stack([moe(x[:, i : i + 1])[:, 0] for i in range(50)], 1)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(moe(x[0, 0]), together[0, 0], atol=1e-5)


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_bfloat16_stays_near_fp32_and_keeps_the_router_in_fp32(mode):
    """Many experts that share the work: rounding may grow with one product's error, not with their number."""
    experts = 24
    wide = layer(experts, experts, equal=True)
    x = inputs(40)
    want = wide(x)
    if mode == "cast":
        narrow = copy.deepcopy(wide)
        for linear in (narrow.gate_proj, narrow.up_proj, narrow.down_proj):
            linear.bfloat16()
        got = narrow(x.bfloat16())
        assert got.dtype == torch.bfloat16
    else:
        narrow = wide
        with torch.autocast("cpu", torch.bfloat16):
            got = narrow(x)
    narrow.record = True
    narrow(x.bfloat16() if mode == "cast" else x)
    assert narrow.router.dtype == narrow.probabilities.dtype == torch.float32
    assert ((got.float() - want).norm() / want.norm()) < 0.01
