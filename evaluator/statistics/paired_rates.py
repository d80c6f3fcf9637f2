"""Intervals of the difference of two rates on the same prompts, also where hardly any prompt tells the models apart."""

from __future__ import annotations

import math
from functools import lru_cache

from scipy import optimize, stats

#: Differences are sought up to here from -1 and 1, where the score's variance is 0.
_EDGE = 1e-9


@lru_cache(maxsize=4096)
def tango(only_a: float, only_b: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of P(a) - P(b) for paired rows (T. Tango, Statistics in Medicine 17, 1998).

    A bootstrap of rows that never differ has no width; this interval is then as wide as n rows without an event allow.

    Args:
        only_a, only_b: rows on which only one of the two holds.
        n: all rows.
    """
    if n <= 0:
        return math.nan, math.nan
    value, z = (only_a - only_b) / n, float(stats.norm.ppf(0.5 + confidence / 2))
    low, high = -1.0, 1.0
    # the score falls in the difference, so each end is the one root on its side of the value
    if _score(-1 + _EDGE, only_a, only_b, n) > z:
        low = float(optimize.brentq(lambda gap: _score(gap, only_a, only_b, n) - z, -1 + _EDGE, value))
    if _score(1 - _EDGE, only_a, only_b, n) < -z:
        high = float(optimize.brentq(lambda gap: _score(gap, only_a, only_b, n) + z, value, 1 - _EDGE))
    return low, high


def _score(gap: float, only_a: float, only_b: float, n: float) -> float:
    """(b - c - n gap) over its standard error, c's probability being the most likely one under that gap (Tango's T)."""
    left = only_a - only_b - n * gap
    if left == 0:
        return 0.0
    linear = -only_a - only_b + (2 * n - only_a + only_b) * gap
    root = math.sqrt(max(linear**2 + 8 * n * only_b * gap * (1 - gap), 0.0))
    chance = (root - linear) / (4 * n)
    variance = n * (2 * chance + gap * (1 - gap))
    return left / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, left)
