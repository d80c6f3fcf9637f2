"""The Triton kernels, run by Triton's interpreter on a CPU: against materialised experts and the reference's gradients."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from models.moe import kernel_sum
from models.moe.expert_sum import ExpertInputs, SumOptions, expert_sum
from models.moe.kernel_sum import ACTIVATIONS, activation_name, fits, serves

# conftest.py asks for the interpreter where there is no GPU; a machine without Triton has nothing to test here
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not kernel_sum._triton(), reason="Triton is not installed")]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
#: experts, k, rank of gate and up, rank of down, tokens, f
SHAPES = [(2, 1, 3, 3, 5, 20), (3, 2, 8, 8, 17, 70), (3, 3, 4, 7, 1, 33), (12, 2, 16, 4, 9, 130), (5, 5, 2, 1, 40, 16)]


def make(experts, slots, rank, down, tokens, f, dtype=torch.float32, seed=0):
    """ExpertInputs whose weights are (N, k), and which experts they are for."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=source) * scale).to(dtype).to(DEVICE)

    chosen = torch.rand(tokens, experts, generator=source).topk(slots).indices
    weights = torch.rand(tokens, slots, generator=source).add(0.1)
    weights = (weights / weights.sum(1, keepdim=True)).to(DEVICE)
    factors = [draw(*shape, scale=0.3) for shape in ((experts, f, rank), (experts, f, rank), (experts, down, f))]
    shared = [draw(tokens, f), draw(tokens, f), draw(tokens, 2, experts, rank)]
    return ExpertInputs(*shared, weights, *factors), chosen.to(DEVICE)


def both(inputs, chosen, options, direction):
    """Outputs and gradients, by field, of the kernels and of the fp64 reference."""
    mine = ExpertInputs(*(t.detach().clone().requires_grad_() for t in inputs))
    got = kernel_sum.kernel_sum(mine, chosen, options)
    want_inputs = ExpertInputs(*(t.detach().double().requires_grad_() for t in inputs))
    mask = options.dropout_mask
    want = expert_sum(want_inputs, chosen, SumOptions(options.activation, mask if mask is None else mask.double(),
                                                      options.dropped_from))
    gradients = torch.autograd.grad(got, mine, [d.to(g.dtype) for d, g in zip(direction, got, strict=True)])
    wanted = torch.autograd.grad(want, want_inputs, [d.double() for d in direction])
    return got, want, gradients, wanted


def assert_near(got, want, tolerance, name):
    want = want.double()
    assert ((got.double() - want).norm() <= tolerance * want.norm() + 1e-12), name


def directions(inputs, seed=7):
    source = torch.Generator().manual_seed(seed)
    tokens, f = inputs.gate.shape
    return [torch.randn(tokens, f, generator=source).to(DEVICE),
            torch.randn(tokens, *inputs.down_a.shape[:2], generator=source).to(DEVICE)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_those_of_materialised_experts(shape):
    inputs, chosen = make(*shape)
    mixed, small = kernel_sum.kernel_sum(inputs, chosen, SumOptions(F.silu))
    for t in range(len(chosen)):
        total, rows = 0, torch.zeros_like(small[t])
        for weight, e in zip(inputs.weights[t], chosen[t].tolist(), strict=True):
            h = weight * F.silu(inputs.gate[t] + inputs.gate_b[e] @ inputs.shrunk_inputs[t, 0, e]) * (
                inputs.up[t] + inputs.up_b[e] @ inputs.shrunk_inputs[t, 1, e])
            total, rows[e] = total + h, inputs.down_a[e] @ h
        torch.testing.assert_close(mixed[t], total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(small[t], rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_gradients_are_those_of_the_fp64_reference(shape, dropout):
    inputs, chosen = make(*shape)
    mask = None
    if dropout:
        mask = (torch.rand(inputs.gate.shape, generator=torch.Generator().manual_seed(1)) > 0.3).float().div(0.7).to(DEVICE)
    options = SumOptions(F.silu, dropout_mask=mask, dropped_from=min(1, shape[3]))
    got, want, gradients, wanted = both(inputs, chosen, options, directions(inputs))
    for name, one, two in zip(("mixed", "small"), got, want, strict=True):
        assert_near(one, two, 1e-5, name)
    for name, one, two in zip(ExpertInputs._fields, gradients, wanted, strict=True):
        assert_near(one, two, 1e-5, name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    inputs, chosen = make(*SHAPES[1])
    _, _, gradients, wanted = both(inputs, chosen, SumOptions(ACTIVATIONS[name]), directions(inputs))
    for field, one, two in zip(ExpertInputs._fields, gradients, wanted, strict=True):
        assert_near(one, two, 1e-5, field)


def test_bfloat16_stays_near_the_fp64_reference():
    inputs, chosen = make(*SHAPES[1], dtype=torch.bfloat16)
    inputs = inputs._replace(weights=inputs.weights.float())
    got, want, gradients, wanted = both(inputs, chosen, SumOptions(F.silu), directions(inputs))
    for name, one, two in zip(("mixed", "small"), got, want, strict=True):
        assert_near(one, two, 1e-2, name)
    for name, one, two in zip(ExpertInputs._fields, gradients, wanted, strict=True):
        assert_near(one, two, 1e-2, name)


@pytest.mark.parametrize(("frozen", "frozen_down"), [(3, 5), (8, 8)])
def test_frozen_factors_get_no_gradient_and_the_others_the_same(frozen, frozen_down):
    inputs, chosen = make(*SHAPES[1])
    _, _, gradients, wanted = both(inputs, chosen, SumOptions(F.silu, frozen=frozen, frozen_down=frozen_down),
                                   directions(inputs))
    for one, two in zip(gradients[4:6], wanted[4:6], strict=True):
        assert not one[:, :, :frozen].any()
        torch.testing.assert_close(one[:, :, frozen:].double(), two[:, :, frozen:], atol=1e-4, rtol=1e-4)
    assert not gradients[6][:, :frozen_down].any()
    torch.testing.assert_close(gradients[6][:, frozen_down:].double(), wanted[6][:, frozen_down:], atol=1e-4, rtol=1e-4)
    assert_near(gradients[0], wanted[0], 1e-5, "gate")


def test_rows_that_lie_apart_are_read_where_they_lie():
    """As ``PackedMoe`` hands them over: views of one product, and the result written into a wider one."""
    inputs, chosen = make(*SHAPES[1])
    tokens, f = inputs.gate.shape
    together = torch.cat([inputs.gate, inputs.up, inputs.shrunk_inputs.flatten(1)], 1)
    views = inputs._replace(gate=together[:, :f], up=together[:, f : 2 * f],
                            shrunk_inputs=together[:, 2 * f :].view(inputs.shrunk_inputs.shape))
    made = torch.full((tokens, f + 3), 9.0, device=DEVICE)
    small = kernel_sum.Call(views, chosen, SumOptions(F.silu)).forward(made[:, :f])
    want = kernel_sum.kernel_sum(inputs, chosen, SumOptions(F.silu))
    assert torch.equal(made[:, :f], want[0])
    assert torch.equal(small, want[1].flatten(1))
    assert (made[:, f:] == 9).all()


def test_two_runs_give_the_same_bits():
    inputs, chosen = make(*SHAPES[3])
    runs = [both(inputs, chosen, SumOptions(F.silu), directions(inputs)) for _ in range(2)]
    for part in (0, 2):
        assert all(torch.equal(one, two) for one, two in zip(runs[0][part], runs[1][part], strict=True))


def test_activations_are_told_by_their_values():
    from transformers.activations import ACT2FN

    assert {name: activation_name(ACT2FN[name]) for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "tanh")} == {
        "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "tanh": None}


@pytest.mark.parametrize(("change", "able"), [
    ({}, True), ({"gate": torch.zeros(2, 4, dtype=torch.float64)}, False), ({"gate_b": torch.zeros(12, 4, 30)}, False)])
def test_what_the_kernels_cannot_do_goes_to_the_reference(change, able):
    inputs, _ = make(12, 2, 4, 4, 2, 4)
    inputs = inputs._replace(**{k: v.to(DEVICE) for k, v in change.items()})
    assert fits(inputs, F.silu) is able
    assert not fits(inputs, torch.tanh)
    # the interpreter is for these tests: a model on a CPU never runs by it
    assert serves(inputs, F.silu) is (able and DEVICE == "cuda")
