"""Means of bounded values have a width whatever the rows are, and it is wide enough: simulations of rare events."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics import bounded, metrics


def test_equal_rows_leave_open_what_the_rule_of_three_leaves():
    z = stats.norm.ppf(0.975) ** 2
    share = z / (100 + z)
    # no event in 100 rows: 1 - 0.025^(1/100) exactly, z^2 / (n + z^2) by the score
    assert share == pytest.approx(1 - 0.025 ** (1 / 100), abs=1e-3)
    zero, half = (metrics.mean([value] * 100, "", "", higher_is_better=True, seed=0, bounds=(0, 1)) for value in (0.0, 0.5))
    assert (zero.value, zero.low, zero.high) == pytest.approx((0, 0, share))
    assert (half.low, half.high) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))
    # in units of its own range
    marks = metrics.mean([1.0] * 100, "", "", higher_is_better=True, seed=0, bounds=(1, 5))
    assert (marks.low, marks.high) == pytest.approx((1, 1 + 4 * share))


def test_paired_means_of_equal_rows_too():
    z = stats.norm.ppf(0.975) ** 2
    found = metrics.paired_mean([0.3] * 50, [0.3] * 50, bounds=(0, 1))
    assert (found.value, found.p) == (0, 1)
    assert (found.low, found.high) == pytest.approx((-z / (50 + z), z / (50 + z)))
    # without bounds nothing is known of rows not seen: NLLs that are equal row by row are those of one model
    assert metrics.paired_mean([2.0] * 50, [2.0] * 50).high == 0


def test_many_kinds_of_rows_leave_the_bootstrap_alone():
    values = np.random.default_rng(0).uniform(size=60).tolist()
    found = metrics.mean(values, "", "", higher_is_better=True, seed=1, bounds=(0, 1))
    assert (found.low, found.high) == metrics.bootstrap_mean(values, 1)
    assert bounded.reach([1.0] * 5 + [0.0] * 5, (0, 1)) == (0.5, 0.5)
    assert bounded.reach([1.0] * 50, (0, math.inf)) == (1, 1)


def test_a_product_of_equal_shares_has_a_width():
    found = metrics.product([1] * 40, [1] * 40, "p", "d", seed=0)
    share = stats.norm.ppf(0.975) ** 2 / (40 + stats.norm.ppf(0.975) ** 2)
    # both factors may be that much lower: root of the sum of squares
    assert (found.value, found.low, found.high) == pytest.approx((1, 1 - math.sqrt(2) * share, 1))


#: What an event does to a row: {name: (draw its size, mean size, value of the other rows)}.
EVENTS = {"whole": (lambda rng, n: np.ones(n), 1.0, 0.0), "half": (lambda rng, n: np.full(n, 0.5), 0.5, 0.0),
          "any size": (lambda rng, n: rng.random(n), 0.5, 0.0),
          "off a tie": (lambda rng, n: rng.choice([-0.5, 0.5], n, p=[0.3, 0.7]), 0.2, 0.5)}


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_means_of_rare_events_are_covered(kind, share):
    draws, n, rng = 400, 100, np.random.default_rng([len(kind), int(100 * share)])
    size, mean, common = EVENTS[kind]
    held, before = 0, 0
    for _ in range(draws):
        values = common + np.where(rng.random(n) < share, size(rng, n), 0)
        drawn = values[rng.integers(0, n, (300, n))].mean(1)
        ends = tuple(np.quantile(drawn, (0.025, 0.975)))
        low, high = bounded.widened(ends, values, (0, 1))
        truth = common + share * mean
        held += low <= truth <= high
        before += ends[0] <= truth <= ends[1]
    assert held / draws >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)
    # the bootstrap alone holds the truth in .5 to .65 of the cases at 1 %
    assert before / draws < (0.75 if share == 0.01 else 0.99)
