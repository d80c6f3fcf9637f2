"""DARE's drop and DELLA's keep probabilities."""

from __future__ import annotations

import pytest
import torch

from models.merging.methods import METHODS
from models.operators.blocks import fuse_tensors
from models.operators.drop import drop, drop_, keep_probabilities, kept_above, kept_below
from models.operators.noise import midpoints, random_bits, uniform


def test_by_hand():
    delta, draws = torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([0.0, 0.25, 0.3, 0.9])
    assert kept_below(draws, 0.25).tolist() == [True, False, False, False]
    assert kept_above(draws, 0.75).tolist() == [False, True, True, True]
    assert drop(delta, kept_below(draws, 0.5), 0.5).tolist() == [2, -4, 6, 0]
    assert drop_(delta.clone(), kept_below(draws, 0.5), 0.5, rescale=False).tolist() == [1, -2, 3, 0]


def test_the_pure_one_leaves_its_input_alone():
    delta = torch.ones(4)
    kept = torch.tensor([True, False, True, False])
    assert torch.equal(drop(delta, kept, 0.5), drop_(delta.clone(), kept, 0.5))
    assert delta.tolist() == [1, 1, 1, 1]


def test_a_density_of_zero_gives_zeros_and_of_one_everything():
    delta, draws = torch.randn(50), uniform(0, "t", 0, 0, 50)
    assert not drop(delta, kept_below(draws, 0.0), 0.0).any()
    assert torch.equal(drop(delta, kept_below(draws, 1.0), 1.0), delta)
    assert torch.equal(drop(delta, kept_above(draws, 1.0), 1.0), delta)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.7])
def test_the_drop_is_the_loop_bit_by_bit(density):
    delta, draws = torch.randn(300), uniform(1, "t", 0, 0, 300)
    for kept in (kept_below(draws, density), kept_above(draws, density)):
        want = torch.tensor([float(x / torch.tensor(density)) if k else 0.0 for x, k in zip(delta, kept, strict=True)])
        assert torch.equal(drop(delta, kept, density), want)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 32767.5 / 65536 + 1 / 65536, 0.999999])
def test_kept_above_is_the_papers_comparison_with_p(p, kind):
    """1 - (1 - p) is not p in floats, but no draw lies between the two."""
    for draws in (uniform(0, "t", 0, 0, 70_000).to(kind), midpoints(random_bits("t", 0, 70_000), kind)):
        assert torch.equal(kept_above(draws, 1 - p), draws >= p)


def test_both_sides_keep_the_share_and_the_expected_value():
    delta, draws = torch.ones(200_000), uniform(2, "t", 0, 0, 200_000)
    for kept in (kept_below(draws, 0.1), kept_above(draws, 0.1)):
        # standard error 3 / sqrt(200000) = 0.0067
        assert abs(float(drop(delta, kept, 0.1).mean()) - 1) < 0.027
    assert not (kept_below(draws, 0.1) & kept_above(draws, 0.1)).any()


def test_keep_probabilities_follow_the_rank_in_the_row():
    values = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]])
    # of the two zeros the first ranks higher
    torch.testing.assert_close(keep_probabilities(values.numpy(), 0.5, 0.2),
                               torch.tensor([[0.7, 0.3, 0.5], [0.5, 0.3, 0.7]]))
    assert keep_probabilities(torch.zeros(2, 1).numpy(), 0.4, 0.2).tolist() == [[pytest.approx(0.4)]] * 2
    assert not keep_probabilities(values.numpy(), 0.0, 0.2).any()


@pytest.mark.parametrize(("density", "epsilon"), [(0.15, 0.15), (0.1, 0.3), (0.0, 0.1)])
def test_a_keep_probability_of_zero_is_no_division_by_zero(density, epsilon):
    row = METHODS["della_linear"]
    parameters = row.parameters(weight=(1.0,), density=(density,), epsilon=(epsilon,))
    fused = fuse_tensors(row, torch.zeros(6, 8), [torch.randn(6, 8)], parameters)
    assert torch.isfinite(fused).all()
