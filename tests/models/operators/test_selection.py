"""Exactly k largest: trim, PEFT's variant, cuts over several tensors and blocks, and the quotas of a whole model."""

from __future__ import annotations

import pytest
import torch

from models.merging.prepare import hand_out
from models.operators.selection import (
    EVERYTHING,
    NOTHING,
    count,
    find_cuts,
    magnitude_bits,
    magnitude_of,
    trim,
    trim_as_peft,
)


def largest_by_sorting(values, k):
    """Values with all but the k largest magnitudes 0; Python sorts (-magnitude, index)."""
    flat = values.flatten().tolist()
    kept = set(sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:k])
    return torch.tensor([x if i in kept else 0.0 for i, x in enumerate(flat)], dtype=values.dtype).view(values.shape)


def with_ties(*shape, seed=0):
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).round() / 4


def test_trim_by_hand():
    values = torch.tensor([[1.0, -3.0, 2.0], [2.0, 0.5, -2.0]])
    assert trim(values, 0.5).tolist() == [[0, -3, 2], [2, 0, 0]]
    assert trim(values, 1.0).tolist() == values.tolist()
    assert trim(values, 0.0).tolist() == torch.zeros(2, 3).tolist()
    assert trim(torch.empty(0), 0.5).shape == (0,)
    assert values[0, 0] == 1


@pytest.mark.parametrize("density", [0.01, 0.2, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_trim_is_a_stable_sort_bit_by_bit(density, kind):
    values = with_ties(20, 30).to(kind)
    assert torch.equal(trim(values, density), largest_by_sorting(values, count(density, 600)))


def test_trim_takes_what_is_not_contiguous_in_its_own_order():
    values = with_ties(6, 4).T
    assert torch.equal(trim(values, 0.5), largest_by_sorting(values, 12))


def test_peft_trims_alike_where_nothing_ties_and_counts_otherwise():
    stack = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trim_as_peft(stack, 0.5), torch.stack([trim(tensor, 0.5) for tensor in stack]))
    assert [int((trim_as_peft(stack, d)[0] != 0).sum()) for d in (0.29, 0.001, 1.0)] == [28, 0, 100]
    assert [int((trim(stack[0], d) != 0).sum()) for d in (0.29, 0.001, 1.0)] == [29, 1, 100]


def test_peft_s_own_function_says_the_same():
    from peft.utils.merge_utils import prune

    stack = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(trim_as_peft(stack, 0.3), torch.stack([prune(tensor, 0.3, "magnitude") for tensor in stack]))


def test_bits_order_as_magnitudes_and_lead_back_to_them():
    values = torch.tensor([0.0, -0.0, 1e-40, -2.5, 3e38])
    bits = magnitude_bits(values)
    assert bits.tolist() == sorted(bits.tolist())
    assert [magnitude_of(int(b)) for b in bits] == values.abs().tolist()
    assert magnitude_of(-1) < 0


def test_several_tensors_and_several_k_in_two_walks():
    one, two = with_ties(500, seed=1), with_ties(500, seed=2)
    walks = []

    def walk():
        walks.append(1)
        return zip(one.split(70), two.split(70), strict=True)

    cuts = find_cuts(walk, [[10, 200], [0, 499, 500]], 500)
    assert len(walks) == 2
    assert [len(row) for row in cuts] == [2, 3]
    assert cuts[1][0] == NOTHING
    assert cuts[1][2] == EVERYTHING
    for values, row, ks in ((one, cuts[0], (10, 200)), (two, cuts[1], (0, 499, 500))):
        for cut, k in zip(row, ks, strict=True):
            for apply in ("mask", "keep"):
                fresh = cut.fresh()
                blocks = [block * fresh.mask(block) if apply == "mask" else fresh.keep(block.clone())
                          for block in values.split(33)]
                assert torch.equal(torch.cat(blocks), largest_by_sorting(values, k))


def test_nothing_to_cut_is_no_walk():
    assert find_cuts(lambda: pytest.fail("walked"), [[0], [7]], 7) == [[NOTHING], [EVERYTHING]]


def test_quotas_go_by_name_until_they_are_used_up():
    equals = {"c": {0: 5, 1: 0}, "a": {0: 2, 1: 3}, "b": {0: 4, 1: 1}}
    assert hand_out({0: 5, 1: 9}, equals) == {"a": {0: 2, 1: 3}, "b": {0: 3, 1: 1}, "c": {0: 0, 1: 0}}
    assert hand_out({}, {}) == {}
