import math

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics import metrics


@pytest.mark.parametrize(("k", "n", "low", "high"), [
    (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (81, 263, 0.2553, 0.3662),
])
def test_wilson_equals_published_values(k, n, low, high):
    assert metrics.wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_no_rows_give_no_interval():
    score = metrics.rate([], "x", "d", higher_is_better=True)
    assert score.n == 0
    assert math.isnan(score.value)
    assert score.as_dict()["value"] is None
    assert metrics.bootstrap_mean([1.0], 0) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(1).normal(3, 1, 200).tolist()
    first, again = metrics.bootstrap_mean(values, 7), metrics.bootstrap_mean(values, 7)
    assert first == again != metrics.bootstrap_mean(values, 8)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert first == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)


def test_constant_rows_have_a_point_interval():
    assert metrics.bootstrap_mean([2.0] * 5, 0) == (2.0, 2.0)


def test_ratio_weighs_rows_by_their_tokens():
    score = metrics.ratio([10, 1], [5, 1], "nll", "d", higher_is_better=False, seed=0)
    assert score.value == pytest.approx(11 / 6)
    assert score.low <= score.value <= score.high


def test_mcnemar_is_the_exact_binomial():
    a, b = [1] * 9 + [0] * 1 + [1] * 10, [0] * 9 + [1] * 1 + [1] * 10
    found = metrics.mcnemar(a, b)
    assert found.value == pytest.approx(8 / 20)
    # two-sided binomial of 1 in 10 at one half: 2 * 11 / 1024
    assert found.p == pytest.approx(22 / 1024)
    assert found.verdict(True) == "better"
    assert found.verdict(False) == "worse"


def test_mcnemar_without_discordant_rows_is_no_difference():
    found = metrics.mcnemar([1, 0, 1], [1, 0, 1])
    assert (found.value, found.p) == (0, 1)
    # three rows that agree rule little out
    assert found.low < -0.5
    assert found.high > 0.5
    assert found.verdict(True) == "no difference"


def test_mcnemar_refuses_other_prompts():
    with pytest.raises(ValueError, match="shorter|longer"):
        metrics.mcnemar([1, 0], [1])


def test_paired_mean_sees_what_unpaired_intervals_hide():
    base = np.random.default_rng(0).normal(0, 10, 100)
    found = metrics.paired_mean((base + 0.5).tolist(), base.tolist())
    assert found.value == pytest.approx(0.5)
    assert found.verdict(True) == "better"
    assert metrics.paired_mean(base.tolist(), base.tolist()).verdict(True) == "no difference"


def test_newcombe_equals_the_published_example():
    # Newcombe (1998), table II: 56/70 - 48/80, method 10
    a = metrics.rate([1] * 56 + [0] * 14, "a", "", higher_is_better=True)
    b = metrics.rate([1] * 48 + [0] * 32, "b", "", higher_is_better=True)
    found = metrics.newcombe(a, b, "gap", "")
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_the_p_of_a_difference_of_differences_belongs_to_its_interval():
    sure, level = metrics.Difference(0.4, 0.3, 0.5, 0.0, 50), metrics.Difference(0.0, -0.1, 0.1, 1.0, 50)
    found = metrics.subtract(sure, level)
    assert found.p == pytest.approx(2 * stats.norm.sf(1.959964 * 0.4 / math.hypot(0.1, 0.1)))
    assert found.verdict(True) == "better"
    assert metrics.subtract(level, level).p == 1
    edge = metrics.Difference(math.hypot(0.1, 0.1), math.hypot(0.1, 0.1) - 0.1, 1, 0.0, 50)
    assert metrics.subtract(edge, level).p == pytest.approx(0.05)


def test_a_bootstrap_that_never_reaches_0_is_as_sure_as_student_t():
    gaps = np.random.default_rng(0).normal(1, 0.5, 60)
    found = metrics.paired_mean(gaps.tolist(), [0.0] * 60)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    # two rows of one size prove nothing, however far from 0
    assert metrics.paired_mean([5.0, 5.0], [0.0, 0.0]).p == 0.5


def test_holm_by_hand():
    # 3 * .01, 2 * .02 and then 1 * .03, which may not fall below .04
    assert metrics.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert metrics.holm([0.6, math.nan]) == [1.0, 1.0]
    assert metrics.holm([]) == []


def test_mc2_by_hand():
    # two right answers with 0.2 and 0.1, one wrong with 0.3: 0.3 / 0.6
    assert metrics.mc2([math.log(0.2), math.log(0.3), math.log(0.1)], [1, 0, 1]) == pytest.approx(0.5)
    # far below the smallest double: only differences count
    assert metrics.mc2([-2000.0, -2000.0], [1, 0]) == pytest.approx(0.5)


def test_mc1_compares_the_best_answer_with_the_wrong_ones_only():
    assert metrics.mc1([-5, -1, -6], [1, 1, 0], best=0) == 1
    assert metrics.mc1([-5, -1, -4], [1, 1, 0], best=0) == 0
    assert metrics.mc1([-4, -4], [1, 0], best=0) == 0


def test_preference_is_per_token():
    assert metrics.preference([-10, -6], [10, 3], best=0) == 1
    assert metrics.preference([-10, -6], [10, 3], best=1) == 0
