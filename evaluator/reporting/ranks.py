"""How sure a row's place on an axis is: rank intervals from all pairs of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from evaluator.reporting.findings import Outcome

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis


def rank_intervals(lines: Sequence[Line], axis: Axis) -> list[tuple[int, int] | None]:
    """For each row the first and the last place that it may have on an axis; None where it has no value.

    A row's first place is one behind the rows that are better than it, its last place is before those that are worse, by
    the paired differences of all pairs, corrected by Holm over the pairs of this axis. Holm keeps the chance of any wrong
    claim below 5 %, so all intervals of an axis hold their ranks at once in 95 % (Mogstad, Romano, Shaikh and Wilhelm,
    2024; Al Mohamad, Goeman and van Zwet, 2022). A pair without common prompts counts as not told apart.
    """
    from evaluator.statistics.comparison import cell, over_seeds
    from evaluator.statistics.metrics import holm

    ranked = [number for number, line in enumerate(lines) if cell(line.found, axis)]
    found = {(a, b): d for a, b in combinations(ranked, 2) if (d := over_seeds(lines[a].found, lines[b].found, axis))}
    better = dict.fromkeys(ranked, 0)
    worse = dict.fromkeys(ranked, 0)
    for ((a, b), d), p in zip(found.items(), holm([d.p for d in found.values()]), strict=True):
        verdict = Outcome(d, p, axis.higher).verdict
        if verdict != "no difference":
            first, second = (a, b) if verdict == "better" else (b, a)
            worse[first] += 1
            better[second] += 1
    return [(1 + better[number], len(ranked) - worse[number]) if number in better else None
            for number in range(len(lines))]
