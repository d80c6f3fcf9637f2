"""Every variant of TIES' election: by hand, against a loop over single numbers, and against each other where they agree."""

from __future__ import annotations

import pytest
import torch

from models.operators.election import agrees, disjoint_sum, elect, elect_, elect_as_peft, elect_unweighted

ONE, TWO = [6.0, -2.0, 4.0, 0.0, 0.0], [-2.0, -4.0, -4.0, 8.0, 0.0]


def pair():
    return torch.tensor(ONE), torch.tensor(TWO)


def values(n, shape=(13, 7), seed=0):
    """Random entries with zeros, ties and entries that balance to a sum of 0."""
    generator = torch.Generator().manual_seed(seed)
    stack = (4 * torch.randn(n, *shape, generator=generator)).round() / 4
    stack[1, 0] = -stack[0, 0]
    return list(stack)


def by_loops(deltas, weights, normalize):
    """One number after another, in the order of the inputs, in fp32."""
    weights = [torch.tensor(w, dtype=torch.float32) for w in weights]
    result = torch.zeros(deltas[0].numel())
    for j, column in enumerate(zip(*(d.flatten() for d in deltas), strict=True)):
        signed = [x * w for x, w in zip(column, weights, strict=True)]
        total = signed[0]
        for x in signed[1:]:
            total = total + x
        merged, share = torch.tensor(0.0), torch.tensor(0.0)
        for x, w in zip(signed, weights, strict=True):
            if (x > 0 and total >= 0) or (x < 0 and total < 0):
                merged, share = merged + x, share + w.abs()
        result[j] = merged / share if normalize and share > 0 else merged
    return result.view(deltas[0].shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.31, 2.9), (1.0, -0.4, 0.5)])
def test_the_election_is_the_loop_bit_by_bit(weights, normalize):
    deltas = values(3)
    assert torch.equal(elect(deltas, weights, normalize), by_loops(deltas, weights, normalize))


def test_by_hand():
    """Signed: [3, -1, 2, 0, 0] and [-1, -2, -2, 4, 0]: sums +, -, 0 (elects plus), +, 0."""
    assert elect(pair(), (0.5, 0.5)).tolist() == [6, -3, 4, 8, 0]
    assert elect(pair(), (0.5, 0.5), normalize=False).tolist() == [3, -3, 2, 4, 0]


def test_a_negative_weight_keeps_its_sign_where_it_stands_alone():
    assert elect([torch.tensor([0.0]), torch.tensor([3.0])], (1.0, -1.0)).tolist() == [-3]


def test_the_one_in_place_consumes_its_inputs_and_the_pure_one_does_not():
    deltas = pair()
    want = elect(deltas, (3.0, 1.0))
    assert [d.tolist() for d in deltas] == [ONE, TWO]
    assert torch.equal(elect_(deltas, (3.0, 1.0), normalize=True), want)
    assert deltas[0].tolist() != ONE


def test_nothing_that_agrees_is_zero_and_not_nan():
    zeros = [torch.zeros(3)] * 2
    assert elect(zeros, (1.0, 1.0)).tolist() == [0, 0, 0]
    assert elect_unweighted(zeros, (0.5, 0.5)).tolist() == [0, 0, 0]
    assert elect_as_peft(torch.zeros(2, 3), torch.ones(2, 1), "total").tolist() == [0, 0, 0]
    assert elect([torch.empty(0)], (1.0,)).shape == (0,)


def test_zero_agrees_with_neither_sign():
    entries = torch.tensor([-1.0, 0.0, 1.0])
    assert agrees(entries, torch.tensor(False)).tolist() == [False, False, True]
    assert agrees(entries, torch.tensor(True)).tolist() == [True, False, False]


def test_of_plain_votes_all_variants_give_the_disjoint_sum():
    deltas = values(3)
    want = elect(deltas, (1.0,) * 3, normalize=False)
    assert torch.equal(disjoint_sum(deltas, deltas), want)
    stack = torch.stack(deltas)
    agreeing = agrees(stack, stack.sum(0) < 0).sum(0).clamp(min=1)
    third = elect_unweighted(deltas, (1 / 3,) * 3)
    torch.testing.assert_close(third * agreeing, want)
    torch.testing.assert_close(elect_as_peft(stack, torch.ones(3, 1, 1), "total") * agreeing, want)


def test_masked_votes_decide_about_plain_deltas():
    # without its mask the second would win the first entry
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 4.0])]
    ballots = [torch.tensor([1.0, 1.0]), torch.tensor([-0.5, 0.0])]
    assert disjoint_sum(deltas, ballots).tolist() == [1, 2]


def test_sce_votes_without_weights_and_averages_with_them():
    # sums 4, -6, 0, 8: what agrees is 6; -2 and -4; 4; 8
    merged = elect_unweighted(pair(), (0.75, 0.25))
    assert merged.tolist() == [6, -2.5, 4, 8, 0]
    # weighted votes would elect minus here
    assert elect_unweighted([torch.tensor([3.0]), torch.tensor([-2.0])], (0.1, 0.9)).tolist() == [3]
    assert elect([torch.tensor([3.0]), torch.tensor([-2.0])], (0.1, 0.9)).tolist() == [-2]


def test_peft_divides_by_the_number_that_agrees_and_not_by_its_weight():
    weights = torch.tensor([3.0, 1.0]).view(2, 1)
    assert elect_as_peft(torch.stack(pair()), weights, "total").tolist() == [18, -5, 12, 8, 0]
    # the majority of signs: two small minus against one large plus
    stack = torch.tensor([[5.0], [-1.0], [-1.0]])
    assert elect_as_peft(stack, torch.ones(3, 1), "total").tolist() == [5]
    assert elect_as_peft(stack, torch.ones(3, 1), "frequency").tolist() == [-1]


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_peft_s_own_function_says_the_same(majority):
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    stack, weights = torch.stack(values(3)), torch.tensor([0.6, -0.3, 0.4]).view(3, 1, 1)
    mask = calculate_majority_sign_mask(stack, method=majority)
    assert torch.equal(elect_as_peft(stack, weights, majority), disjoint_merge(stack * weights, mask))
