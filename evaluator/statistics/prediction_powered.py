"""A judge's rate, corrected by labels of some of the very answers that it is the rate of (prediction-powered inference)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from evaluator.statistics.metrics import CONFIDENCE, Score


def prediction_powered(said: Sequence[bool | int], labelled: Sequence[tuple[bool | int, bool | int]], name: str,
                       definition: str, *, higher_is_better: bool) -> Score:
    """The true rate from a judge's verdicts on all answers and labels of a random part of them (Angelopoulos et al., 2023).

    The power-tuned form for a mean (PPI++, Angelopoulos, Duchi and Zrnic, 2023): lambda mean(f) over the answers without
    label, plus mean(y - lambda f) over those with one, where lambda = cov(y, f) / ((1 + n/N) var(f)), cut at 0 and 1. A
    judge that tells nothing gets lambda 0, and what is left is the labels' own mean.
    The interval is Student's t with n - 1 degrees of freedom on the variances of both parts. Each part gets two answers more
    for it (Agresti and Coull's idea): a yes and a no, half of each rightly judged and half wrongly, for a few labels that
    show no error are no proof of a judge without one.

    Args:
        said: the judge's verdicts on the N answers without a label.
        labelled: (the judge's verdict, the label) of the n others.

    Raises:
        ValueError: no label, or no answer without one.
    """
    if not labelled or not len(said):
        raise ValueError(f"{len(labelled)} labelled and {len(said)} other answers: both are needed")
    f, (g, y) = np.asarray(said, float), np.asarray(labelled, float).T
    n, others = len(y), len(f)
    power = _power(y, g, n / others)
    value = power * f.mean() + (y - power * g).mean()
    # half an answer for each of the four (verdict, label): their middle is 1/2, and no variance is 0
    ys, gs, fs = np.append(y, [1, 0, 1, 0]), np.append(g, [1, 0, 0, 1]), np.append(f, [1, 0])
    weights, over = np.append(np.ones(n), [0.5] * 4), np.append(np.ones(others), [1.0, 1.0])
    variance = _variance(ys - power * gs, weights) + power**2 * _variance(fs, over)
    middle = power * np.average(fs, weights=over) + np.average(ys - power * gs, weights=weights)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt(variance)
    low, high, value = (min(1.0, max(0.0, float(x))) for x in (middle - half, middle + half, value))
    return Score(value, min(low, value), max(high, value), n + others, name, definition, higher_is_better)


def _power(y: np.ndarray, g: np.ndarray, ratio: float) -> float:
    spread = float(g.var())
    return min(1.0, max(0.0, float(((y - y.mean()) * (g - g.mean())).mean()) / ((1 + ratio) * spread))) if spread else 0.0


def _variance(values: np.ndarray, weights: np.ndarray) -> float:
    """Of the weighted mean."""
    mean = np.average(values, weights=weights)
    return float(np.average((values - mean) ** 2, weights=weights) / weights.sum())
