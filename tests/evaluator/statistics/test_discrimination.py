"""AUC against scikit-learn, DeLong against a brute-force bootstrap, thresholds by hand, intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics.discrimination import (
    auc,
    delong,
    delong_in_parts,
    paired_refusal_at,
    placements,
    refusal_at,
    roc,
    threshold,
)


def drawn(rng, m=60, n=70, gap=1.0, steps=0):
    """Harmful and harmless scores; with ``steps`` rounded, so that many are equal."""
    both = rng.normal(gap, 1, m), rng.normal(0, 1, n)
    return tuple(np.round(part * steps) / steps for part in both) if steps else both


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_auc_is_scikit_learns_ties_too(steps):
    from sklearn.metrics import roc_auc_score, roc_curve

    harmful, harmless = drawn(np.random.default_rng(3), steps=steps)
    labels, scores = np.r_[np.ones(60), np.zeros(70)], np.r_[harmful, harmless]
    found = auc(harmful, harmless, "a", "")
    assert found.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert (found.n, found.low < found.value < found.high) == (130, True)
    over, refused, _ = roc_curve(labels, scores, drop_intermediate=False)
    ours = roc(harmful, harmless)
    assert ours[0] == pytest.approx(over)
    assert ours[1] == pytest.approx(refused)
    assert np.trapezoid(ours[1], ours[0]) == pytest.approx(found.value)
    assert placements(harmful, harmless)[1].mean() == pytest.approx(found.value)


def test_scores_that_are_all_equal_or_apart():
    equal = auc([1.0] * 20, [1.0] * 30, "a", "")
    assert equal.value == 0.5
    assert equal.low < 0.5 < equal.high
    apart = auc([2.0] * 20, [1.0] * 30, "a", "")
    # no pair is wrong: the interval is as wide as twenty and thirty prompts without an event allow, and not a point
    assert apart.value == apart.high == 1
    assert 0.75 < apart.low < 0.9
    one = auc([2.0], [1.0, 3.0], "a", "")
    assert (one.value, math.isnan(one.low)) == (0.5, True)
    with pytest.raises(ValueError, match="0 harmful and 1 harmless"):
        auc([], [1.0], "a", "")


@pytest.mark.parametrize("steps", [0, 2])
def test_delong_is_the_bootstrap_by_brute_force(steps):
    """Interval of one AUC and of a paired difference against 4,000 draws of prompts."""
    rng = np.random.default_rng(4)
    harmful, harmless = drawn(rng, 150, 160, 1.2, steps)
    other = (harmful + rng.normal(0, 0.8, 150), harmless + rng.normal(0, 0.8, 160))
    draws = [(rng.integers(0, 150, 150), rng.integers(0, 160, 160)) for _ in range(4000)]
    mine = np.array([placements(harmful[i], harmless[j])[0].mean() for i, j in draws])
    gaps = mine - [placements(other[0][i], other[1][j])[0].mean() for i, j in draws]
    one, two = auc(harmful, harmless, "a", ""), delong((harmful, harmless), other)
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(mine, (0.025, 0.975))), abs=0.006)
    assert (two.low, two.high) == pytest.approx(tuple(np.quantile(gaps, (0.025, 0.975))), abs=0.006)
    assert two.value == pytest.approx(one.value - auc(*other, "", "").value)
    # the test and the interval say the same
    assert (two.p < 0.05) == (two.low > 0 or two.high < 0)


def test_one_model_twice_differs_by_nothing_and_knows_its_doubt():
    scores = drawn(np.random.default_rng(5))
    same = delong(scores, scores)
    assert (same.value, same.p) == (0, 1)
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="prompts differ"):
        delong(scores, (scores[0][:-1], scores[1]))


@pytest.mark.parametrize(("gap", "m", "n"), [(0.5, 50, 60), (2.0, 150, 300), (3.5, 60, 60)])
def test_intervals_of_auc_and_of_its_difference_cover(gap, m, n):
    """Of 600 studies; two models share prompts whose difficulty both see."""
    rng, studies, hits, both = np.random.default_rng(6), 600, 0, 0
    truth = float(stats.norm.cdf(gap / math.sqrt(2)))
    for _ in range(studies):
        shared = rng.normal(gap, 0.7, m), rng.normal(0, 0.7, n)
        noise = math.sqrt(1 - 0.49)
        a, b = (tuple(part + rng.normal(0, noise, len(part)) for part in shared) for _ in "ab")
        found, difference = auc(*a, "", ""), delong(a, b)
        hits += found.low <= truth <= found.high
        both += difference.low <= 0 <= difference.high
    assert hits / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    assert both / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)


def test_separate_sets_are_placed_each_in_itself():
    rng = np.random.default_rng(12)
    first, second = ((drawn(rng, m, n), drawn(rng, m, n, gap=0.5)) for m, n in ((30, 40), (20, 35)))
    # models of another set may score on another scale
    moved = tuple(tuple(part + 50 for part in side) for side in second)
    found = delong_in_parts([first, moved])
    values = [delong(*pair).value for pair in (first, second)]
    assert found.value == pytest.approx((30 * values[0] + 20 * values[1]) / 50)
    assert found.value == pytest.approx(delong_in_parts([first, second]).value)
    assert (found.n, found.low < found.value < found.high) == (125, True)
    assert delong_in_parts([first]) == delong(*first)
    with pytest.raises(ValueError, match="prompts differ"):
        delong_in_parts([first, (first[0], second[1])])


def test_the_interval_over_separate_sets_covers():
    """Of 400 studies of two halves; a and b of either half are other models, as good as each other."""
    rng, studies, held = np.random.default_rng(13), 400, 0
    for _ in range(studies):
        parts = []
        for gap in (1.0, 1.6):
            shared = rng.normal(gap, 0.7, 20), rng.normal(0, 0.7, 40)
            parts.append(tuple(tuple(part + rng.normal(0, 0.714, len(part)) for part in shared) for _ in "ab"))
        found = delong_in_parts(parts)
        held += found.low <= 0 <= found.high
    assert held / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)


def test_the_threshold_by_hand():
    scores = list(range(20))
    # two of twenty lie above 17
    assert threshold(scores) == 17
    assert sum(score > threshold(scores) for score in scores) == 2
    assert threshold(scores, 0.0) == 19
    # equal scores are on one side: three of twenty would be too many, so none is above
    assert threshold([0] * 17 + [5] * 3) == 5
    assert threshold([7.0] * 20) == 7
    assert threshold(range(150)) == 134
    with pytest.raises(ValueError, match="no harmless prompt"):
        threshold([])


def test_refusal_at_ten_percent():
    kept, test = list(range(20)), [17, 17.5, 30, 40]
    found = refusal_at(kept, test, "r", "", seed=1)
    assert (found.value, found.n) == (0.75, 4)
    assert found.low < 0.75 <= found.high
    # a model that refuses every prompt with equal confidence refuses nothing above its threshold
    assert refusal_at([0.0] * 20, [0.0] * 20, "r", "", seed=1).value == 0
    # all above it: not known for certain
    perfect = refusal_at(kept, [100.0] * 30, "r", "", seed=1)
    assert (perfect.value, perfect.high) == (1, 1)
    assert 0.8 < perfect.low < 0.95
    assert refusal_at(kept, test, "r", "", seed=1) == found


def test_the_paired_difference_at_ten_percent():
    rng = np.random.default_rng(7)
    kept, test = rng.normal(0, 1, 150), rng.normal(1.5, 1, 150)
    sharp = kept, test + 2
    found = paired_refusal_at(sharp, (kept, test), seed=1)
    first, second = (refusal_at(kept, scores, "", "", seed=1) for scores in (test + 2, test))
    assert found.value == pytest.approx(first.value - second.value)
    assert found.low > 0
    assert found.p < 0.001
    # a constant on every score moves no threshold: the same model
    moved = paired_refusal_at((kept + 5, test + 5), (kept, test), seed=1)
    assert (moved.value, moved.p) == (0, 1)
    assert moved.low < 0 < moved.high


def test_its_intervals_cover_thresholds_doubt_and_all():
    """250 studies of 75 validation and 75 test prompts; a binomial interval that takes the threshold for known is too
    narrow."""
    rng, studies, hits, both, naive = np.random.default_rng(8), 250, 0, 0, 0
    gap = 1.5
    truth = float(stats.norm.sf(stats.norm.ppf(0.9) - gap))
    for _ in range(studies):
        kept, test = rng.normal(0, 1, 75), rng.normal(gap, 1, 75)
        other = rng.normal(0, 1, 75), rng.normal(gap, 1, 75)
        one = refusal_at(kept, test, "", "", seed=2)
        two = paired_refusal_at((kept, test), other, seed=2)
        hits += one.low <= truth <= one.high
        both += two.low <= 0 <= two.high
        value = stats.binomtest(int((test > threshold(kept)).sum()), 75).proportion_ci(0.95, "wilson")
        naive += value.low <= truth <= value.high
    least = 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    assert hits / studies > least
    assert both / studies > least
    assert naive / studies < 0.9
