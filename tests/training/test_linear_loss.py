"""The chunked head loss equals torch's cross-entropy over all logits, value and gradient."""

from __future__ import annotations

import pytest
import torch

from training import linear_loss
from training.linear_loss import answer_loss


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
