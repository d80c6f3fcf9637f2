"""What a table can show at all: scores without a model beside it, and the smallest difference that its comparisons find."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data import escaped

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis

#: Share of the cases in which a difference of that size is found.
POWER = 0.8
#: What each row without a model is.
SAID = {"chance": "all answers of a question ranked at random",
        "negation rule": "answers with a negation (no, not, never, n't ...) first, the rest at random; it reads no question"}


def without_model(lines: Sequence[Line], axes: Sequence[Axis]) -> dict[str, list[float | None]]:
    """Baseline -> its expected value on every axis; None where no file has it, or where rows were put to other questions."""
    found: dict[str, list[set[float]]] = {}
    for line in lines:
        for item in line.found:
            for number, axis in enumerate(axes):
                kept = item.origin.get(axis.score, {}).get("details", {}).get("baselines", {})
                for name, values in kept.items():
                    if axis.score in values:
                        found.setdefault(name, [set() for _ in axes])[number].add(values[axis.score])
    return {name: [values.pop() if len(values) == 1 else None for values in columns] for name, columns in found.items()}


def detectable(lines: Sequence[Line], axes: Sequence[Axis]) -> str:
    """A sentence: per axis the difference that a comparison of the last row finds in 80 % of the cases, at 5 % uncorrected.

    (z(.975) + z(.8)) standard errors, which the intervals of the very comparisons tell; the least and the greatest of them.
    """
    from scipy import stats

    from evaluator.statistics.comparison import over_seeds
    from evaluator.statistics.metrics import CONFIDENCE

    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    parts = []
    for axis in axes:
        halves = [(d.high - d.low) / 2 for line in lines[:-1] if (d := over_seeds(lines[-1].found, line.found, axis))]
        sizes = [half * (1 + float(stats.norm.ppf(POWER)) / z) for half in halves if not math.isnan(half)]
        if sizes:
            ends = list(dict.fromkeys(f"{size:.3f}" for size in (min(sizes), max(sizes))))
            parts.append(f"{axis.title} {' to '.join(ends)}")
    size = f"{POWER * 100:.0f} % of such comparisons of {lines[-1].label} find (two-sided 5 %, not corrected)"
    return f"- Smallest true difference that {size}, by row: {'; '.join(parts)}." if parts else ""


def same_labels(flag: str, labels: Sequence[str]) -> list[str]:
    """What is wrong with the labels of a table's rows: two that are read as the same, or one of a row without a model."""
    seen: dict[str, str] = {}
    problems = []
    for label in labels:
        # as it is shown: a blank or a character without a shape tells nobody apart
        shown = unicodedata.normalize("NFKC", escaped.markdown(label)).strip()
        if shown in seen:
            problems.append(f"{flag}: two rows are called '{shown}'; give each a label of its own, LABEL=RUN")
        elif shown in (f"({name})" for name in SAID) or not shown:
            problems.append(f"{flag}: '{shown}' is no label for a model; give another, LABEL=RUN")
        seen[shown] = label
    return problems


def equal_rows(lines: Sequence[Line], axes: Sequence[Axis]) -> str:
    """A sentence on rows of the table that are equal row by row where values have no bounds: their interval has no width."""
    from evaluator.statistics.comparison import over_seeds

    found: dict[str, list[str]] = {}
    for axis in axes:
        for line in lines[:-1] if axis.kind in ("ratio", "scale") else ():
            d = over_seeds(lines[-1].found, line.found, axis)
            if d and d.low == d.high == 0:
                found.setdefault(line.label, []).append(axis.title)
    listed = "; ".join(f"{label} ({', '.join(titles)})" for label, titles in found.items())
    if not found:
        return ""
    return (f"- Equal to {lines[-1].label} in every row: {listed}. These are one model by what was measured, and the "
            "difference has no width: values without bounds do not say how far a row not seen could be off.")
