"""Intervals hold the truth as often as they say: simulations with a tolerance of three standard errors."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics import comparison, crossed, metrics
from evaluator.statistics.axes import AXES, Measured
from evaluator.statistics.paired_rates import tango

wilson = lru_cache(maxsize=None)(metrics.wilson)


def error(coverage, draws):
    """Three standard errors of a simulated coverage."""
    return 3 * math.sqrt(coverage * (1 - coverage) / draws)


def test_tango_equals_its_score_equation():
    # b = 9, c = 1 of 50: the ends are where (b - c - n d) / sqrt(n (2 q + d (1 - d))) is 1.96, q the likeliest c
    for end, sign in zip(tango(9, 1, 50), (1, -1), strict=True):
        grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
        # likelihood of q for a gap d: 9 log(q + d) + 1 log(q) + 40 log(1 - 2 q - d)
        fit = grid[(grid + end > 0) & (1 - 2 * grid - end > 0)]
        best = fit[np.argmax(9 * np.log(fit + end) + np.log(fit) + 40 * np.log(1 - 2 * fit - end))]
        score = (9 - 1 - 50 * end) / math.sqrt(50 * (2 * best + end * (1 - end)))
        assert score == pytest.approx(sign * 1.959964, abs=2e-3)


def test_rows_that_never_differ_leave_an_interval():
    z = stats.norm.ppf(0.975) ** 2
    # no discordant row: d = z^2 / (n + z^2), by hand from the score equation with q = 0
    assert tango(0, 0, 100) == pytest.approx((-z / (100 + z), z / (100 + z)), abs=1e-6)
    assert tango(5, 0, 5)[1] == 1.0
    assert tango(0, 5, 5) == tuple(-end for end in reversed(tango(5, 0, 5)))


@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [60, 100, 300])
def test_paired_rates_cover(discordant, n):
    draws = 3000
    shares = discordant * np.array([0.7, 0.3])
    counts = np.random.default_rng(n).multinomial(n, [*shares, 1 - discordant], draws)
    held = [low <= shares[0] - shares[1] <= high for low, high in (tango(int(b), int(c), n) for b, c, _ in counts)]
    # discrete counts may only make it wider
    assert np.mean(held) >= 0.95 - error(0.95, draws)
    if discordant >= 0.1:
        assert np.mean(held) <= 0.97


#: Spread of seeds, prompts and of both together, on the scale of a normal number that is 1 where it is above a threshold.
WORLDS = {"prompts differ": (0, -2.0, 0.0, 2.0, 0.5), "seeds differ too": (1, -2.0, 0.5, 2.0, 0.5),
          "all three": (2, 0.0, 0.3, 1.5, 1.0)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seeds", [3, 5])
def test_rates_over_seeds_cover(world, seeds):
    number, level, by_seed, by_prompt, both = WORLDS[world]
    draws, prompts, rng = 400, 100, np.random.default_rng([number, seeds])
    truth = stats.norm.sf(-level / math.sqrt(by_seed**2 + by_prompt**2 + both**2))
    held, held_before = 0, 0
    for _ in range(draws):
        table = level + by_seed * rng.normal(size=(seeds, 1)) + by_prompt * rng.normal(size=(1, prompts)) \
            + both * rng.normal(size=(seeds, prompts)) > 0
        found = [(float(row.mean()), *wilson(int(row.sum()), prompts)) for row in table]
        _, low, high = crossed.over_seeds(found, crossed.common_share([table.astype(float)]))
        held += low <= truth <= high
        _, low, high = crossed.over_seeds(found)
        held_before += low <= truth <= high
    # with three seeds it holds the truth in up to .975 of the cases, never in less than .95
    assert 0.95 - error(0.95, draws) <= held / draws <= 0.975 + error(0.975, draws)
    assert held <= held_before


def test_the_share_that_seeds_have_in_common():
    prompts = np.random.default_rng(0).normal(size=40)
    assert crossed.common_share([np.tile(prompts, (3, 1))]) == 1
    assert crossed.common_share([np.ones((3, 40))]) == 1
    alone = np.random.default_rng(1).normal(size=(40, 500))
    assert crossed.common_share([alone]) == pytest.approx(0, abs=0.02)
    assert crossed.common_share([alone + np.random.default_rng(2).normal(size=500)]) == pytest.approx(0.5, abs=0.05)


def test_student_t_over_seeds_without_rows():
    nan = math.nan
    found = crossed.over_seeds([(1.0, nan, nan), (2.0, nan, nan), (3.0, nan, nan)])
    assert found == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert crossed.over_seeds([(1.0, 0.5, 1.2)]) == (1.0, 0.5, 1.2)


def test_p_over_seeds_is_where_the_interval_meets_0():
    found = [(0.2, 0.1, 0.3), (0.3, 0.2, 0.4), (0.28, 0.18, 0.38)]
    p = crossed.p_value(found, 0.5)
    value, spread = 0.26, np.std([0.2, 0.3, 0.28], ddof=1) / math.sqrt(3)
    half = math.hypot(stats.t.isf(p / 2, 2) * spread, 0.1 * stats.norm.isf(p / 2) / 1.959964 * math.sqrt(0.5))
    assert half == pytest.approx(value, rel=1e-4)
    assert crossed.p_value([(0.0, -0.1, 0.1)] * 2) == 1
    # 95 %: both agree on which side of 0 the interval ends
    assert (p < 0.05) == (crossed.over_seeds(found, 0.5)[1] > 0)


def test_the_report_counts_prompts_that_all_seeds_share_once():
    axis = AXES[0]
    rng = np.random.default_rng(3)
    # what one seed refuses says nothing of the next: 300 answers, not 100 prompts seen three times
    runs = []
    for seed in range(3):
        hits = (rng.random(100) < 0.5).astype(int)
        score = metrics.rate(hits, "safe_refusal", "", higher_is_better=True)
        rows = {("safety", str(i)): {"safe_refusal": int(hit)} for i, hit in enumerate(hits)}
        runs.append(Measured(None, {"safe_refusal": score.as_dict()}, rows, {}, seed))
    apart = comparison.cell(runs, axis)
    same = comparison.cell([runs[0]] * 3, axis)
    assert same.low == pytest.approx(runs[0].scores["safe_refusal"]["low"])
    ends = [tuple(item.scores["safe_refusal"][k] for k in ("value", "low", "high")) for item in runs]
    assert apart.high - apart.low < np.subtract(*crossed.over_seeds(ends)[:0:-1])
