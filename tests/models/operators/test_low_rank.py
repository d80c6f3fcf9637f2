"""Products, inner products and norms of low-rank changes, without the matrix and with it."""

from __future__ import annotations

import pytest
import torch

from models.moe.router import low_rank_norm
from models.operators.low_rank import differentiable_norm, inner, low_rank, pair_norm, pair_squared_norm, product


def make(rank, seed=0, out=9, width=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)


def test_by_hand():
    pair = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    assert product(pair).tolist() == [[3, 6], [0, 0]]
    assert inner(pair, (torch.eye(2), torch.eye(2))) == 3
    assert pair_squared_norm(pair) == 45
    assert pair_norm(pair) == pytest.approx(45**0.5)


def test_inner_products_and_norms_are_those_of_the_matrices():
    one, two = make(3), make(4, seed=1)
    first, second = (b.double() @ a.double() for a, b in (one, two))
    assert inner(one, two) == pytest.approx(float((first * second).sum()))
    assert pair_norm(one) == pytest.approx(float(first.norm()))
    assert torch.equal(product(one), one[1] @ one[0])


def test_equal_changes_cancel_and_never_below_zero():
    a, b = make(3)
    twice = torch.cat([a, a]), torch.cat([b, -b], 1)
    assert pair_squared_norm(twice) == pytest.approx(0, abs=1e-10)
    assert pair_squared_norm(twice) >= 0
    assert pair_norm((torch.zeros(2, 5), torch.ones(3, 2))) == 0


def test_the_differentiable_norm_is_the_norm_for_stacks_too():
    pairs = [make(3, seed=i) for i in range(4)]
    a, b = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    norms = differentiable_norm(a, b)
    assert norms.shape == (4,)
    assert norms.tolist() == pytest.approx([pair_norm(pair) for pair in pairs], rel=1e-5)
    assert torch.equal(low_rank_norm(a, b), norms)


def test_its_gradient_is_the_matrix_norms_and_zero_at_zero():
    a, b = (factor.requires_grad_() for factor in make(3))
    differentiable_norm(a, b).backward()
    own = a.grad.clone()
    a.grad = None
    (b @ a).norm().backward()
    torch.testing.assert_close(own, a.grad, rtol=1e-4, atol=1e-5)
    zero = torch.zeros(9, 3, requires_grad=True)
    differentiable_norm(a.detach(), zero).backward()
    assert not zero.grad.any()


def test_the_nearest_of_a_rank_is_the_cut_svd():
    matrix = product(make(5))
    u, values, vh = torch.linalg.svd(matrix)
    cut = low_rank(matrix, 2)
    torch.testing.assert_close(product(cut.pair), u[:, :2] * values[:2] @ vh[:2], rtol=1e-4, atol=1e-4)
    assert cut.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert cut.norm == pytest.approx(pair_norm(make(5)), rel=1e-5)
