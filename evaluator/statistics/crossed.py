"""Seeds crossed with prompts: every seed answers the same prompts, so neither rows nor seeds alone are the sample.

A value is mu + seed_i + prompt_j + rest_ij. Seeds and prompts are drawn at random, the rest is what both leave over. The
mean over S seeds and N prompts has the variance var(seed)/S + var(prompt)/N + var(rest)/(S N). The spread of the seeds'
means estimates the first and the last part together, so of an interval over prompts only the prompts' own part is added.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import optimize, stats

from evaluator.statistics.metrics import CONFIDENCE


def common_share(parts: Sequence[np.ndarray]) -> float:
    """var(prompt) / (var(prompt) + var(rest)) by the mean squares of two-way tables; 1 where nothing varies.

    Args:
        parts: a table (seeds, prompts) for each set of prompts that a score is made from.
    """
    common = rest = 0.0
    for table in parts:
        seeds, prompts = table.shape
        if seeds < 2 or prompts < 2:
            return 1.0
        by_prompt, by_seed = table.mean(0), table.mean(1, keepdims=True)
        left = table - by_prompt - by_seed + table.mean()
        within = float((left**2).sum()) / ((seeds - 1) * (prompts - 1))
        # E[mean square of prompts] = var(rest) + S var(prompt)
        between = seeds * float(by_prompt.var(ddof=1))
        common += max(between - within, 0.0) / seeds / prompts
        rest += within / prompts
    return common / (common + rest) if common + rest > 0 else 1.0


def share_of(parts: Sequence[Sequence[Mapping[Hashable, float]]]) -> float:
    """``common_share`` of values by prompt, on the prompts that all seeds have; 1, the widest, where they share none.

    Args:
        parts: for each set of prompts that a score is made from, one seed after the other: {prompt: value}.
    """
    tables = []
    for seeds in parts:
        shared = [prompt for prompt in seeds[0] if all(prompt in values for values in seeds[1:])] if seeds else []
        if not shared:
            return 1.0
        tables.append(np.array([[values[prompt] for prompt in shared] for values in seeds], float))
    return common_share(tables) if tables else 1.0


def over_seeds(found: Sequence[tuple[float, float, float]], shared: float = 1.0) -> tuple[float, float, float]:
    """Mean over seeds of (value, low, high), its ends as far off as seeds and prompts together put them.

    The half width is the root of the sum of squares of Student's t over the seeds' values and of the seeds' mean half width
    over prompts times sqrt(shared); it is never less than that half width over sqrt(S), which it would be if all answers
    of all seeds were independent. An end that a seed lacks (NaN) adds nothing; one seed keeps its own interval. Each
    variance has its own quantile, as in the modified large-sample intervals of Burdick and Graybill (1992): one quantile
    for both by Satterthwaite is too narrow with three seeds.

    Args:
        shared: ``common_share`` of the rows; 1, the widest, where the rows are not known.
    """
    if len(found) < 2:
        return found[0]
    value = float(np.mean([part[0] for part in found]))
    return value, value - _half(found, 1, shared, CONFIDENCE), value + _half(found, 2, shared, CONFIDENCE)


def p_value(found: Sequence[tuple[float, float, float]], shared: float = 1.0) -> float:
    """Two-sided p of a mean over seeds: the least 1 - confidence at which ``over_seeds`` still leaves out 0."""
    value = float(np.mean([part[0] for part in found]))
    end = 1 if value > 0 else 2

    def left(p: float) -> float:
        return abs(value) - _half(found, end, shared, 1 - p)

    least, most = 1e-12, 1 - 1e-12
    if left(most) <= 0:
        return 1.0
    return least if left(least) >= 0 else float(optimize.brentq(left, least, most))


def _half(found: Sequence[tuple[float, float, float]], end: int, shared: float, confidence: float) -> float:
    seeds, tail = len(found), 0.5 + confidence / 2
    values = [part[0] for part in found]
    # ddof 1: the mean is estimated from the same few seeds
    spread = float(stats.t.ppf(tail, seeds - 1) * np.std(values, ddof=1) / math.sqrt(seeds))
    known = [abs(part[end] - part[0]) for part in found if not math.isnan(part[end])]
    # an interval at another confidence is as much wider as the normal quantile is
    rows = float(np.mean(known) * stats.norm.ppf(tail) / stats.norm.ppf(0.5 + CONFIDENCE / 2)) if known else 0.0
    return max(math.hypot(spread, rows * math.sqrt(shared)), rows / math.sqrt(seeds))
