"""What rows of a kind not seen yet leave open of a bounded mean: a bootstrap cannot draw a value that no row has.

Of n equal rows a bootstrap gives an interval without width, though an event of chance p stays away from n rows with
(1 - p)^n: at 95 %, two-sided, a share of about 3.7 / n is not ruled out (the rule of three, Hanley and Lippman-Hand, JAMA
1983; the exact form is Clopper and Pearson's, 1934, for no event). With few events a bootstrap is too narrow, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from evaluator.statistics.paired_rates import tango

#: Rows that must differ from the commonest value for a bootstrap to stand alone (n p >= 10, as for a normal interval).
FEW = 10


def reach(values: Sequence[float], bounds: tuple[float, float], confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the mean that unseen rows could bring; (mean, mean) where ``FEW`` rows, or half, are not of one value.

    Tango's score interval (1998) of the rows' distances from the commonest value, in units of the longest distance that
    the bounds allow: a row half that far counts as half an event, whose variance is less than an event's, so the interval is
    wide enough. Without any event it is z^2 / (n + z^2) of that distance.

    Args:
        bounds: least and greatest value that a row can have; an infinite one leaves nothing to say: (mean, mean).
    """
    found = np.asarray(values, float)
    mean, n = float(found.mean()), len(found)
    kinds, counts = np.unique(found, return_counts=True)
    common = float(kinds[counts.argmax()])
    low, high = min(bounds[0], float(kinds[0])), max(bounds[1], float(kinds[-1]))
    longest = max(common - low, high - common)
    if n - counts.max() >= min(FEW, n / 2) or not 0 < longest < math.inf:
        return mean, mean
    gaps = (found - common) / longest
    ends = tango(float(gaps.clip(min=0).sum()), float((-gaps).clip(min=0).sum()), n, confidence)
    return max(low, common + longest * ends[0]), min(high, common + longest * ends[1])


def widened(ends: tuple[float, float], values: Sequence[float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """An interval of the mean of ``values``, widened to what unseen rows could bring; as it is without bounds."""
    if bounds is None:
        return ends
    low, high = reach(values, bounds)
    return min(ends[0], low), max(ends[1], high)


def widened_of(value: Callable[[Sequence[float]], float], columns: Sequence[Sequence[float]], ends: tuple[float, float],
               bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """The same for a number made of several means: each mean is moved to its ends alone, the moves joined as the root of
    the sum of squares (variance estimates recovery, Zou and Donner, Statistics in Medicine 2008).

    Args:
        value: the means -> the number.
        columns: the rows of each mean.
    """
    means = [float(np.mean(column)) for column in columns]
    whole, down, up = float(value(means)), 0.0, 0.0
    for at, column in enumerate(columns):
        moves = [float(value([*means[:at], end, *means[at + 1 :]])) - whole for end in reach(column, bounds)]
        down, up = down + min(*moves, 0.0) ** 2, up + max(*moves, 0.0) ** 2
    return min(ends[0], whole - math.sqrt(down)), max(ends[1], whole + math.sqrt(up))
