"""Router start values, gating loss, drift: numbers of the spec, checked by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data.records import OBJECTIVES, Record
from models.moe.router import (
    discriminant_router,
    drift,
    gate_loss,
    low_rank_norm,
    mean_probabilities,
    published_weight_norm,
    random_router,
    route,
)

CORNERS = {"right": [1.0, 0.0, 0.0], "uniform": [1 / 3, 1 / 3, 1 / 3], "wrong": [0.0, 1.0, 0.0]}


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def corner(name, layers=4, batch=2):
    return torch.tensor(CORNERS[name]).expand(layers, batch, 3), torch.zeros(batch, dtype=torch.long)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("name", "want"), [("right", 0.5514), ("uniform", 1.0986), ("wrong", 1.5514)])
def test_published_gate_loss_at_the_corners(name, want, per_layer):
    loss = gate_loss(*corner(name), per_layer=per_layer, published=True)
    assert loss.shape == (2,)
    assert torch.allclose(loss, torch.full((2,), want), atol=1e-4)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("name", "low", "high"), [("right", 0, 1e-6), ("uniform", 1.0986, 1.0987), ("wrong", 20, 100)])
def test_proper_gate_loss_at_the_corners(name, low, high, per_layer):
    loss = gate_loss(*corner(name), per_layer=per_layer)
    assert ((loss >= low - 1e-6) & (loss <= high)).all()


@pytest.mark.parametrize(("published", "want"), [(True, 1.033), (False, 0.916)])
def test_gate_loss_between_the_corners(published, want):
    means = torch.tensor([0.4, 0.3, 0.3]).expand(5, 1, 3)
    assert gate_loss(means, torch.tensor([0]), published=published).item() == pytest.approx(want, abs=1e-3)


def test_published_gradient_never_vanishes_and_the_proper_one_does():
    """The second softmax leaves 0.424 on the right expert at perfection (spec 5.2)."""
    means = torch.tensor([[[1.0, 0.0, 0.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gate_loss(means, torch.tensor([0]), published=True).sum(), means)
    assert gradient[0, 0, 0].item() == pytest.approx(-0.424, abs=1e-3)
    logits = torch.tensor([[[30.0, 0.0, 0.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gate_loss(logits.softmax(-1), torch.tensor([0])).sum(), logits)
    assert gradient.abs().max() < 1e-6


def test_one_loss_on_the_layer_mean_differs_from_a_loss_per_layer():
    means = torch.tensor([[[0.9, 0.05, 0.05]], [[0.1, 0.45, 0.45]]])
    target = torch.tensor([0])
    assert gate_loss(means, target).item() == pytest.approx(-torch.tensor(0.5).log().item(), abs=1e-6)
    by_hand = -(torch.tensor([0.9, 0.1]).log().mean())
    assert gate_loss(means, target, per_layer=True).item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_every_sample_is_held_against_its_own_objective():
    means = seeded(3, 4, 5).softmax(-1)
    objectives = torch.tensor([4, 0, 2, 2])
    want = [-means[:, i].mean(0)[o].log() for i, o in enumerate(objectives)]
    assert torch.allclose(gate_loss(means, objectives), torch.stack(want))


@pytest.mark.parametrize("published", [False, True])
def test_pads_do_not_change_the_gate_loss(published):
    short, target = [seeded(2, 6, 3, seed=i).softmax(-1) for i in range(3)], torch.tensor([0, 2])
    mask = torch.ones(2, 6, dtype=torch.long)
    want = gate_loss(mean_probabilities(short, mask), target, published=published)
    padded = [torch.cat([p, seeded(2, 9, 3, seed=50 + i).softmax(-1)], 1) for i, p in enumerate(short)]
    longer = F.pad(mask, (0, 9))
    got = gate_loss(mean_probabilities(padded, longer), target, published=published)
    assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(gate_loss(mean_probabilities(padded, torch.ones_like(longer)), target,
                                        published=published), want, atol=1e-3)


def test_mean_probabilities_by_hand_and_without_tokens():
    p = seeded(2, 4, 3).softmax(-1)
    means = mean_probabilities([p, 1 - p], torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]))
    assert means.shape == (2, 2, 3)
    assert torch.allclose(means[0, 0], (p[0, 0] + p[0, 2]) / 2)
    assert torch.allclose(means[1, 0], 1 - (p[0, 0] + p[0, 2]) / 2)
    assert (means[:, 1] == 0).all()


@pytest.mark.parametrize("shape", [(4, 7, 9), (1, 3, 3), (8, 5, 6)])
def test_low_rank_norm_is_the_frobenius_norm(shape):
    rank, inputs, outputs = shape
    a, b = seeded(3, rank, inputs, seed=1), seeded(3, outputs, rank, seed=2)
    want = torch.linalg.matrix_norm(b.double() @ a.double())
    assert torch.allclose(low_rank_norm(a, b).double(), want, rtol=1e-5)


def test_low_rank_norm_has_the_gradient_of_the_materialised_norm():
    a = seeded(4, 7, seed=1).requires_grad_()
    b = seeded(9, 4, seed=2).requires_grad_()
    got = torch.autograd.grad(low_rank_norm(a, b), (a, b))
    want = torch.autograd.grad(torch.linalg.matrix_norm(b @ a), (a, b))
    for one, two in zip(got, want, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("zero", ["b", "a", "both"])
def test_low_rank_norm_is_zero_with_zero_gradient_at_the_start(zero):
    a, b = (seeded(4, 7, seed=1), seeded(9, 4, seed=2))
    a, b = (a * (zero == "b")).requires_grad_(), (b * (zero == "a")).requires_grad_()
    norm = low_rank_norm(a, b)
    norm.backward()
    assert norm.item() == 0
    assert (a.grad == 0).all()
    assert (b.grad == 0).all()


@pytest.mark.parametrize(("mode", "want"), [("norm", 2.0), ("squared", 14 / 3), ("relative", (0.5 + 0.2 + 0.3) / 3)])
def test_drift_modes(mode, want):
    norms, base = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 10.0, 10.0])
    assert drift(norms, base, mode).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("mode", ["norm", "squared", "relative"])
def test_drift_is_zero_at_the_start(mode):
    assert drift(torch.zeros(6), torch.ones(6), mode).item() == 0


def test_published_weight_norm_is_the_sum_by_hand():
    groups = [[seeded(2, 3, seed=1), seeded(4, 2, seed=2)], [seeded(2, 3, seed=3), seeded(4, 2, seed=4)]]
    constants = [3.5, 4.5]
    want = (sum(w.norm() for group in groups for w in group) + 8.0) / 2
    assert published_weight_norm(groups, constants, 2).item() == pytest.approx(want.item(), rel=1e-6)


def test_published_weight_norm_pulls_with_a_unit_vector_over_the_layers():
    """Measured on the original: norm 1/32 on every A, 0 on B while B is zero (spec 5.4)."""
    a = seeded(2, 3, seed=1).requires_grad_()
    b = torch.zeros(4, 2, requires_grad=True)
    published_weight_norm([[a, b]] + [[] for _ in range(31)], [100.0], 32).backward()
    assert a.grad.norm().item() == pytest.approx(1 / 32, rel=1e-5)
    assert torch.allclose(a.grad, a.detach() / a.detach().norm() / 32, atol=1e-7)
    assert (b.grad == 0).all()


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 2), (3, 3), (12, 2), (12, 12)])
def test_route_keeps_the_best_and_renormalises(experts, top_k):
    logits = seeded(20, experts) * 3
    probabilities, weights, chosen = route(logits, top_k)
    assert torch.allclose(probabilities, logits.softmax(-1))
    assert weights.shape == chosen.shape == (20, top_k)
    assert torch.allclose(weights.sum(-1), torch.ones(20))
    best = logits.topk(top_k, -1)
    assert torch.equal(chosen, best.indices)
    # softmax over all, top k, renormalise = softmax over the top-k logits
    assert torch.allclose(weights, best.values.softmax(-1), atol=1e-6)


def test_route_computes_in_fp32():
    logits = seeded(5, 4).bfloat16()
    probabilities, weights, _ = route(logits, 2)
    assert probabilities.dtype == weights.dtype == torch.float32


def planted(classes=3, hidden=16, rows=200, noise=0.3, shift=2.0):
    """Points around planted class means: points (classes, rows, hidden), means, covariance within classes."""
    centres = seeded(classes, hidden, seed=1) + shift
    points = centres[:, None] + noise * seeded(classes, rows, hidden, seed=2)
    means = points.mean(1)
    rest = (points - means[:, None]).flatten(0, 1)
    return points, means, rest.T @ rest / len(rest)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_discriminant_router_separates_planted_classes(classes):
    points, means, covariance = planted(classes)
    router = discriminant_router(means, covariance, sharpness=4.0)
    assert router.shape == (classes, 16)
    assert router.dtype == torch.float32
    right = (points @ router.T).argmax(-1) == torch.arange(classes)[:, None]
    assert right.float().mean() > 0.95


def test_discriminant_router_gives_the_grand_mean_no_preference():
    _, means, covariance = planted()
    router = discriminant_router(means, covariance, sharpness=4.0)
    assert (router @ means.mean(0)).abs().max() < 1e-4
    assert (means @ router.T).diagonal().min() > 0


def test_discriminant_router_is_as_sharp_as_asked():
    points, means, covariance = planted(noise=1.0)
    router = discriminant_router(means, covariance, sharpness=4.0)
    twice = discriminant_router(means, covariance, sharpness=8.0)
    assert torch.allclose(twice, 2 * router, rtol=1e-5)
    assert 2.0 < (points @ router.T).std().item() < 8.0


def test_discriminant_router_of_centred_classes_is_finite():
    """Class means that average to zero: there is no grand-mean direction to remove."""
    _, means, covariance = planted()
    router = discriminant_router(means - means.mean(0), covariance, sharpness=4.0)
    assert router.isfinite().all()
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    router = discriminant_router(means, torch.eye(2), sharpness=4.0)
    assert router.isfinite().all()
    assert (means @ router.T).argmax(-1).tolist() == [0, 1]


def test_discriminant_router_of_equal_classes_or_no_variance_is_finite():
    means = torch.ones(3, 4)
    assert discriminant_router(means, torch.eye(4), 4.0).isfinite().all()
    assert discriminant_router(seeded(3, 4), torch.zeros(4, 4) + 1e-8 * torch.eye(4), 4.0).isfinite().all()


def test_random_router_is_seeded_and_has_the_asked_spread():
    def draw(seed):
        return random_router(3, 4096, 0.02, torch.Generator().manual_seed(seed))

    torch.manual_seed(5)
    one = draw(1)
    torch.manual_seed(6)
    assert torch.equal(one, draw(1))
    assert not torch.equal(one, draw(2))
    assert one.shape == (3, 4096)
    assert one.dtype == torch.float32
    assert one.std().item() == pytest.approx(0.02, rel=0.05)


def test_router_from_data_separates_the_objectives(pico, monkeypatch):
    from flags import FuseMoeArgs
    from models.base.loading import load_base, load_tokenizer
    from models.llama_moe import data_routers

    texts = {"helpfulness": "bake bread flour", "safety": "I'm sorry, I can't", "truthfulness": "Paris, France? 1789"}
    splits = []

    def rows(task, split, **options):
        splits.append(split)
        return [Record(f"{texts[task]} {i}", texts[task], OBJECTIVES.index(task)) for i in range(20)]

    monkeypatch.setattr("data.sources.load_records", rows)
    model, tokenizer = load_base(pico, torch.float32, torch.device("cpu")), load_tokenizer(pico)
    args = FuseMoeArgs(router_rows=8)
    routers = data_routers(model, tokenizer, args, torch.device("cpu"))
    assert splits == ["train"] * 3
    assert [router.shape for router in routers] == [(3, 32)] * 2
    again = data_routers(model, tokenizer, args, torch.device("cpu"))
    assert all(torch.equal(one, two) for one, two in zip(routers, again, strict=True))
    # the hooks are gone
    ffns = [layer.mlp for layer in model.model.layers]
    assert not any(ffn._forward_pre_hooks for ffn in ffns)
    seen = {}
    for i, ffn in enumerate(ffns):
        ffn.register_forward_pre_hook(lambda _, x, i=i: seen.__setitem__(i, x[0][0]))
    for e, text in enumerate(texts.values()):
        model.model(torch.tensor([tokenizer(text)["input_ids"]]))
        for i, router in enumerate(routers):
            assert route(seen[i] @ router.T, 1)[0].mean(0).argmax() == e
