"""What a table can show at all: scores without a model beside it, and the smallest difference that its comparisons find."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data import escaped
from errors import UserError

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis

#: Share of the cases in which a difference of that size is found.
POWER = 0.8
#: Rows hold six digits, and likelihoods four.
_EQUAL = 1e-3
#: What each row without a model is.
SAID = {"chance": "all answers of a question ranked at random",
        "negation rule": "answers with a negation (no, not, never, n't ...) first, the rest at random; it reads no question",
        "length": "the longer a prompt, the likelier it is refused; it reads none"}


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


def twice(flag: str, names: Iterable[str]) -> list[str]:
    """What is wrong with a list of seeds: a run or folder that is named twice is no seed of its own."""
    again = [name for name, count in Counter(name.strip() for name in names).items() if count > 1]
    return [f"{flag}: {name} is named twice among its seeds; name each once" for name in again]


def unknown(lines: Sequence[Line], roots: Sequence[Path]) -> list[str]:
    """Runs that no folder knows: a misspelt name would stand there as a row that nobody has scored yet."""
    from evaluator.reporting import run_records

    known = {"base", "raw", *(name for root in roots for name in run_records.names(root))}
    wanted = [(run, line.found[at * len(roots) : (at + 1) * len(roots)]) for line in lines
              for at, run in enumerate(line.run.split("+"))]
    return [f"--runs {run}: not in {', '.join(map(str, roots))}; there: {', '.join(sorted(known))}" for run, found in wanted
            if run not in known and not any(item.scores for item in found)]


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


def beside_rows(lines: Sequence[Line], axes: Sequence[Axis]) -> list[str]:
    """Sentences on scores that their own rows do not give, and on values that rows have no number of.

    Raises:
        UserError: a score is no value of its kind, e.g. a share above 1.
    """
    notes, problems = [], []
    for line in lines:
        notes += [f"- {line.label}: {text}." for item in line.found for text in item.unread]
        for axis in axes:
            low, high = axis.bounds
            for item in line.found:
                value = (item.scores.get(axis.score) or {}).get("value")
                if value is None:
                    continue
                if not low - _EQUAL <= value <= high + _EQUAL:
                    problems.append(f"{line.label}: {axis.score} is {value:g} in the registry, and lies between {low:g} and "
                                    f"{high:g} by what it is; run {axis.command}.py again with --overwrite")
                rows = [values for (name, _), values in item.rows.items() if name == axis.set and axis.key in values]
                if not rows or axis.kind == "balance":
                    continue
                over = sum(values["tokens"] for values in rows) if axis.kind == "ratio" else len(rows)
                mean = sum(values[axis.key] for values in rows) / over
                n = item.scores[axis.score]["n"]
                if abs(mean - value) > _EQUAL * max(1.0, abs(value)) or n != len(rows):
                    notes.append(f"- Not what the rows say: {axis.title} of {line.label} is {value:.3f} over {n} in the "
                                 f"registry and {mean:.3f} by its {len(rows)} rows; the table shows the first, the "
                                 "differences go by the second.")
    if problems:
        raise UserError(*problems)
    return notes
