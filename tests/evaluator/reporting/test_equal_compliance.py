"""The comparison at equal compliance: right where the answer is known, and no finding where there is nothing to find."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluator.reporting.sweeps import curve as sweep
from evaluator.reporting.sweeps.curve import Point

LAMBDAS = np.arange(0, 1.01, 0.1)


def falling(start, end, middle, speed):
    return end + (start - end) / (1 + np.exp((LAMBDAS - middle) * speed))


#: What each lambda truly does: harm, compliance, and a control's compliance within the curve.
CURVES = {"flat": (np.full(11, 0.4), np.linspace(0.9, 0.5, 11), 0.7),
          "slow": (np.linspace(0.8, 0.3, 11), np.linspace(0.95, 0.7, 11), 0.85),
          "cliff": (falling(0.97, 0.02, 0.5, 12), falling(0.95, 0.05, 0.5, 12), 0.5),
          "better than its trade": (falling(0.93, 0.03, 0.4, 14), falling(0.95, 0.1, 0.75, 10), 0.7),
          # the hardest of eight that were tried: it bends sharply where lambda is chosen
          "early": (falling(0.9, 0.05, 0.3, 15), np.linspace(0.98, 0.6, 11), 0.8)}


def answers(chances, n, rng):
    """0 or 1 by (model, prompt): some prompts are easy for all models."""
    difficulty = rng.normal(size=n) * math.sqrt(0.5) + rng.normal(size=(len(chances), n)) * math.sqrt(0.5)
    return (difficulty < stats.norm.ppf(chances)[:, None]).astype(int)


def compared(name, effect, n, rng):
    """A control that does as well as the best lambda of the true curve at its compliance, plus ``effect`` of harm."""
    harm, comply, level = CURVES[name]
    fine = np.linspace(0, 1, 2001)
    best = np.interp(fine, LAMBDAS, harm)[np.interp(fine, LAMBDAS, comply) >= level - 1e-9].min()
    harms, complies = answers(np.append(harm, best + effect), n, rng), answers(np.append(comply, level), n, rng)
    points = [Point("", "", weight, dict(enumerate(map(int, h))), dict(enumerate(map(int, c))))
              for weight, h, c in zip([*LAMBDAS, math.nan], harms, complies, strict=True)]
    return sweep.at_equal_compliance(points[:-1], points[-1])


def verdicts(name, effect, n, draws, seed):
    """Shares of the draws in which fusion is found better, and worse."""
    rng = np.random.default_rng(seed)
    found = [compared(name, effect, n, rng) for _ in range(draws)]
    return tuple(sum(bad(d) for d in found if d) / draws for bad in (lambda d: d.high < 0, lambda d: d.low > 0))


@pytest.mark.parametrize("name", CURVES)
def test_both_error_rates_hold_where_there_is_no_difference(name):
    draws = 300
    better, worse = verdicts(name, 0.0, 60, draws, 11)
    # 2.5 % and three standard errors of a simulation of this size
    limit = 0.025 + 3 * math.sqrt(0.025 * 0.975 / draws)
    assert better <= limit
    assert worse <= limit


def test_differences_are_found():
    assert verdicts("cliff", 0.3, 100, 40, 1)[0] >= 0.8
    assert verdicts("cliff", -0.3, 100, 40, 2)[1] >= 0.8


def test_an_interval_without_discordant_prompts_has_a_width():
    points = [Point("", "", weight, dict.fromkeys(range(50), 1), {i: int(i >= step) for i in range(50)})
              for step, weight in enumerate((0.0, 0.5, 1.0))]
    found = sweep.at_equal_compliance(points, points[1])
    assert found.value == 0
    assert found.low < -0.03 < 0.03 < found.high
