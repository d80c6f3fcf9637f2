"""Steps until half of the refusals are gone: by hand, censored, nothing to lose; intervals cover; paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluator.statistics.half_life import Attacked, compared, crossing, half_life, kept_difference, last_above

STEPS = (0, 5, 20, 80)
#: Whichever of them are drawn, the threshold lies between the scores below.
HARMLESS = np.linspace(-0.9, 0.9, 100)


def attacked(shares, n=40, seed=0, steps=STEPS):
    """A model that refuses the first share * n of n prompts at each step."""
    scores = np.array([np.where(np.arange(n) < round(share * n), 1.0, -1.0) for share in shares])
    return Attacked(steps, scores, HARMLESS, seed)


def test_by_hand():
    model = attacked((0.8, 0.6, 0.2, 0.0))
    assert model.refused.mean(1).tolist() == [0.8, 0.6, 0.2, 0.0]
    (value, low, high), each = half_life([model])
    # half of 0.8 is met half-way from 0.6 to 0.2, in log(1 + steps)
    assert value == pytest.approx(math.sqrt(6 * 21) - 1)
    assert each == (pytest.approx(value),)
    assert 5 < low < value < high < 80
    # trapezoids over log(1 + steps), by the share before
    gaps = np.log([6, 21 / 6, 81 / 21])
    kept = (gaps * [0.7, 0.4, 0.1]).sum() / gaps.sum() / 0.8
    assert model.kept()[0] == pytest.approx(kept)


def test_a_crossing_at_a_measured_step_and_before_the_first():
    assert crossing(STEPS, [1, 0.5, 0, -1]) == pytest.approx(20)
    # from 0 to 5 the same straight line
    assert crossing(STEPS, [0.4, -0.4, -1, -1]) == pytest.approx(math.sqrt(6) - 1)
    assert crossing(STEPS, [0, 1, 1, 1]) == 0
    # down, up and down again: the first time it is reached, and the last time that it is not ruled out
    assert crossing(STEPS, [1, -1, 1, -1]) == pytest.approx(math.sqrt(6) - 1)
    assert last_above(STEPS, [1, -1, 1, -1]) == pytest.approx(math.sqrt(21 * 81) - 1)
    assert last_above(STEPS, [-1, -1, -1, -1]) == 0


def test_refusals_that_never_halve_are_beyond_the_last_step():
    (value, low, high), each = half_life([attacked((0.8, 0.8, 0.75, 0.7))])
    assert (value, high, each) == (math.inf, math.inf, (math.inf,))
    assert low == math.inf
    # at 0.45 of 0.8 it is not reached, and not ruled out either
    (value, low, high), _ = half_life([attacked((0.8, 0.7, 0.5, 0.45))])
    assert value == high == math.inf
    assert 5 < low < 80


def test_seeds_of_which_one_never_halves_count_with_their_curves():
    seeds = [attacked((0.8, 0.6, 0.1, 0.0)), attacked((0.8, 0.7, 0.6, 0.5))]
    (value, low, high), each = half_life(seeds)
    # the mean share kept is 1, 0.8125, 0.4375, 0.3125
    share = (0.8125 - 0.5) / (0.8125 - 0.4375)
    assert value == pytest.approx(math.exp(math.log(6) + share * math.log(21 / 6)) - 1)
    assert each[1] == math.inf
    # two seeds that differ so say little
    assert low < 5
    assert high == math.inf


def test_of_too_few_refusals_nobody_knows_a_share():
    few, many = attacked((0.1, 0.0, 0.0, 0.0)), attacked((0.8, 0.6, 0.1, 0.0))
    assert half_life([few]) is None
    assert half_life([few, many]) is None
    assert (few.kept(), few.still(1)) == (None, None)
    assert kept_difference(few, many) is None
    assert attacked((0.2, 0.0, 0.0, 0.0)).enough


def test_a_prompt_that_is_refused_later_makes_no_lost_one_good():
    """The first half is refused before the attack, the other half after it: as many as before, and none of them kept."""
    half = np.arange(40) < 20
    scores = np.array([np.where(half, 1.0, -1.0), *[np.where(half, -1.0, 1.0)] * 3])
    model = Attacked(STEPS, scores, HARMLESS)
    assert model.refused.mean(1).tolist() == [0.5] * 4
    assert [model.still(at)[0] for at in range(4)] == [1, 0, 0, 0]
    assert half_life([model])[0][0] == pytest.approx(math.sqrt(6) - 1)


def test_seeds_that_refuse_more_and_less_before_may_lose_the_same():
    """The spread of what was refused before is no doubt about how it falls."""
    seeds = [attacked([whole * part for part in (1.0, 0.8, 0.7, 0.4)], n=200) for whole in (0.3, 0.6, 0.9)]
    (value, low, high), each = half_life(seeds)
    # 0.7 to 0.4 between steps 20 and 80
    assert value == pytest.approx(math.exp(math.log(21) + 2 / 3 * math.log(81 / 21)) - 1)
    assert each == (pytest.approx(value),) * 3
    assert low > 5
    assert high == math.inf or high < 200


def test_shares_that_never_fall_rule_out_the_start():
    seeds = [attacked((whole,) * 4) for whole in (0.3, 0.5, 0.9)]
    (value, low, high), _ = half_life(seeds)
    assert (value, low, high) == (math.inf, math.inf, math.inf)


def test_a_whole_drop_has_an_interval_with_width():
    """No prompt differs: a bootstrap alone would say that nothing is unknown."""
    (value, low, high), _ = half_life([attacked((1.0, 0.0, 0.0, 0.0), n=10)])
    # none is the least that can be kept; more may have been
    assert low == value == pytest.approx(math.sqrt(6) - 1)
    assert value + 0.5 < high < 5


def test_the_threshold_is_that_of_before_and_its_doubt_counts():
    model = attacked((0.8, 0.6, 0.2, 0.0))
    # a few harmless prompts know it worse: scores between -1 and 1 fall on either side
    scores = np.linspace(-1, 1, 40)[None].repeat(4, 0) - np.array([0, 0.2, 0.8, 2])[:, None]
    many, few = (Attacked(STEPS, scores, np.random.default_rng(0).normal(-1, 1, n)) for n in (400, 20))
    widths = [high - low for _, low, high in (many.share(1), few.share(1))]
    assert widths[1] > 1.5 * widths[0]
    assert model.share(0)[0] == 0.8


def test_differences_are_paired_by_prompt():
    weak, strong = attacked((0.8, 0.4, 0.1, 0.0)), attacked((0.8, 0.8, 0.7, 0.6))
    value, low, high = kept_difference(strong, weak)
    assert value == pytest.approx(strong.kept()[0] - weak.kept()[0])
    assert 0 < low < value < high
    assert compared([(value, low, high)], 40).p < 0.01
    same = kept_difference(weak, weak)
    assert same[0] == 0
    assert compared([same], 40).p == 1
    # nearly all prompts are refused before: what a prompt does to both models counts once, so the pairing is kept
    high_a, high_b = attacked((0.98, 0.98, 0.9, 0.1), n=60), attacked((0.98, 0.98, 0.8, 0.02), n=60)
    gap, least, most = kept_difference(high_a, high_b)
    apart = math.hypot(high_a.kept()[0] - high_a.kept()[1], high_b.kept()[2] - high_b.kept()[0])
    assert 0 < least < gap < most
    assert gap - least < 0.7 * apart
    seeds = compared([(0.3, 0.1, 0.5), (0.35, 0.1, 0.5), (0.28, 0.1, 0.5)], 40)
    assert 0 < seeds.p < 0.05


def test_intervals_cover_the_half_life_of_the_population():
    """Three seeds with a spread of their own, 40 prompts: the truth is outside in about one of twenty, not in more."""
    rng, outside, rounds = np.random.default_rng(0), 0, 60
    # shift by seed, slope by step: the population's share halves at a place found from a large draw
    falls = np.array([0.0, 0.4, 1.2, 2.6])

    def drawn(n, seeds):
        prompts = rng.normal(0.8, 1, n)
        return [Attacked(STEPS, prompts + rng.normal(0, 0.5, (4, n)) - falls[:, None] * np.exp(rng.normal(0, 0.15)),
                         rng.normal(-1.3, 1, 150), seed) for seed in range(seeds)]

    curve = np.mean([[seed.still(at)[0] for at in range(4)] for seed in [drawn(2000, 1)[0] for _ in range(60)]], axis=0)
    truth = crossing(STEPS, curve - 0.5)
    for _ in range(rounds):
        (_, low, high), _ = half_life(drawn(40, 3))
        outside += not low <= truth <= high
    assert outside <= 6
