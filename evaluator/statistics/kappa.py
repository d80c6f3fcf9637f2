"""Cohen's kappa of two yes/no judges, with an interval that draws whole groups of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_RESAMPLES = 2000


@dataclass(frozen=True)
class Kappa:
    """Agreement of judges a and b on one set of answers.

    Args:
        value: Cohen's kappa; NaN where both judges say the same of every answer.
        low, high: 95 % percentile bootstrap over prompts (all runs' answers to a prompt are drawn together).
        both, only_a, only_b, neither: how many answers got yes from whom.
    """

    task: str
    a: str
    b: str
    value: float
    low: float
    high: float
    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def said(self) -> str:
        """The value with its interval; words where there is none."""
        return "no variation" if math.isnan(self.value) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; NaN becomes None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(self).items()}


def kappa_of(a: Sequence[bool], b: Sequence[bool], groups: Sequence[str], seed: int,
             names: tuple[str, str, str] = ("", "a", "b")) -> Kappa:
    """Cohen's kappa of two yes/no judges (Cohen, 1960); whole groups are drawn for the interval."""
    import numpy as np
    from sklearn.metrics import cohen_kappa_score

    if not len(a) == len(b) == len(groups):
        raise ValueError(f"rows differ: {len(a)}, {len(b)} and {len(groups)}")
    # groups, not rows: several runs' answers to one prompt are no independent draws
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    # four counts per group: a resample is then a product of matrices
    cells = np.zeros((len(order), 4))
    for x, y, group in zip(a, b, groups, strict=True):
        cells[order[group], 2 * (not x) + (not y)] += 1
    both, only_a, only_b, neither = (int(n) for n in cells.sum(0))
    # chance agreement is 1 there, and kappa 0 / 0
    same = max(both, neither) == len(a)
    value = math.nan if same else float(cohen_kappa_score(list(a), list(b)))
    low = high = math.nan
    if not same and len(order) > 1:
        draws = np.random.default_rng(seed).multinomial(len(order), np.full(len(order), 1 / len(order)), _RESAMPLES)
        values = _kappas(draws @ cells)
        # a draw may hold one kind of answer only, where kappa is not defined
        low, high = (float(end) for end in np.nanquantile(values, (0.025, 0.975)))
    return Kappa(*names, value, low, high, both, only_a, only_b, neither)


def _kappas(cells: Any) -> Any:
    """Kappa of each row of counts (both, only a, only b, neither); NaN where chance already agrees on everything."""
    import numpy as np

    n = cells.sum(1)
    seen = (cells[:, 0] + cells[:, 3]) / n
    yes_a, yes_b = (cells[:, 0] + cells[:, 1]) / n, (cells[:, 0] + cells[:, 2]) / n
    chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (seen - chance) / (1 - chance), np.nan)
