"""The chunked head loss equals torch's cross-entropy over all logits, value and gradient."""

from __future__ import annotations

import pytest
import torch

from models.base.heads import LogitRule
from training import linear_loss
from training.linear_loss import CHUNK, answer_loss


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_value_and_gradient(monkeypatch, rows):
    monkeypatch.setattr(linear_loss, "CHUNK", 16)
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, 12, requires_grad=True), torch.nn.Linear(12, 50, bias=False)
    targets = torch.randint(0, 50, (rows,))
    whole = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    head.weight.requires_grad_(False)
    chunked = answer_loss(hidden, head, targets)
    torch.testing.assert_close(chunked, whole)
    (want,), (got,) = torch.autograd.grad(whole * 0.3, hidden), torch.autograd.grad(chunked * 0.3, hidden)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_without_gradient_and_without_rows():
    head = torch.nn.Linear(4, 9, bias=False).requires_grad_(False)
    with torch.no_grad():
        assert answer_loss(torch.randn(3, 4), head, torch.tensor([0, 1, 2])) > 0
    assert answer_loss(torch.zeros(0, 4, requires_grad=True), head, torch.zeros(0, dtype=torch.long)) == 0


def test_a_trained_head_gets_a_gradient():
    head = torch.nn.Linear(4, 9)
    answer_loss(torch.randn(3, 4), head, torch.tensor([0, 1, 2])).backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.25), LogitRule(cap=2.0), LogitRule(scale=3.0, cap=1.5)])
def test_cap_scale_and_bias_against_autograd_in_double(monkeypatch, rule, bias):
    monkeypatch.setattr(linear_loss, "CHUNK", 5)
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.double, requires_grad=True)
    head = torch.nn.Linear(8, 21, bias=bias, dtype=torch.double).requires_grad_(False)
    targets = torch.randint(0, 21, (13,))
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * rule.scale
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = answer_loss(hidden, head, targets, rule)
    torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-12)
    (want,), (got,) = torch.autograd.grad(whole * 0.3, hidden), torch.autograd.grad(found * 0.3, hidden)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-11)
    assert torch.autograd.gradcheck(lambda h: answer_loss(h, head, targets, rule), (hidden,))


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.5, cap=2.0)])
def test_a_head_that_trains_follows_the_rule_too(rule):
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(6, 8), torch.nn.Linear(8, 11), torch.randint(0, 11, (6,))
    trained = answer_loss(hidden, head, targets, rule)
    trained.backward()
    assert head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(answer_loss(hidden, head.requires_grad_(False), targets, rule), trained.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_bitwise_what_it_was(dtype):
    """The embedded default's numbers: the loss and gradient of a head without cap, scale and bias, written out as before."""
    torch.manual_seed(0)
    weight = torch.nn.Linear(16, 60, bias=False, dtype=dtype).requires_grad_(False)
    hidden, targets = torch.randn(CHUNK + 44, 16, dtype=dtype, requires_grad=True), torch.randint(0, 60, (CHUNK + 44,))
    total, gradient = torch.zeros((), dtype=torch.float32), torch.empty_like(hidden)
    with torch.no_grad():
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = torch.nn.functional.linear(hidden[rows], weight.weight).float()
            logits -= logits.logsumexp(-1, keepdim=True)
            total -= logits.gather(1, targets[rows, None]).sum()
            logits.exp_().scatter_add_(1, targets[rows, None], torch.full_like(targets[rows, None], -1, dtype=logits.dtype))
            torch.matmul(logits.to(dtype), weight.weight, out=gradient[rows])
    found = answer_loss(hidden, weight, targets)
    found.backward()
    assert torch.equal(found.detach(), total)
    assert torch.equal(hidden.grad, gradient)
