"""A table of models as data: what every format writes. Its differences and comparisons beside it, as data too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line, Outcome
    from evaluator.statistics.axes import Axis, Measured
    from evaluator.statistics.comparison import Cell


@dataclass(frozen=True)
class Column:
    """One score.

    Args:
        name: of the score, e.g. safe_refusal.
        title: as people read it, with its direction.
        higher: whether more is better.
        signed: whether it is a difference, shown with its sign.
        most: where measuring ended: an infinite value lies beyond it and is shown as "> most".
    """

    name: str
    title: str
    higher: bool
    definition: str = ""
    signed: bool = False
    most: float = math.inf


@dataclass(frozen=True)
class Row:
    """One model: label, run (or runs a+b), a name for each seed, and its cells by the columns' names."""

    label: str
    run: str
    seeds: tuple[str, ...]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """Models down, scores across; a cell that was not measured is absent."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def of_lines(title: str, lines: Sequence[Line], axes: Sequence[Axis]) -> Table:
    """The main table of a report."""
    from evaluator.statistics.comparison import cell

    columns = tuple(Column(axis.score, axis.title, axis.higher, _definition(lines, axis)) for axis in axes)
    return Table(title, columns, tuple(
        Row(line.label, line.run, seed_names(line), {
            axis.score: found for axis in axes if (found := cell(line.found, axis))}) for line in lines))


def _definition(lines: Sequence[Line], axis: Axis) -> str:
    scores = [item.scores[axis.score] for line in lines for item in line.found if axis.score in item.scores]
    return scores[0]["definition"] if scores else ""


def known_axes(found: Sequence[Measured], more: Sequence[str] = ()) -> list[Axis]:
    """The columns that these runs have a score for, in the report's order.

    Args:
        more: columns that are asked for: secondary readings, corrected rates, refusal by likelihood.
    """
    from evaluator.statistics.axes import (
        AXES,
        CORRECTED,
        SECONDARY,
        UTILITY_AXES,
        judge_axes,
        refusal_axes,
        set_axes,
    )
    from evaluator.statistics.comparison import cell

    # a judge's rate is a column, the mean of its number stays in the score files
    judged = [axis for axis in judge_axes(found) if axis.kind != "scale"]
    asked = [axis for axis in (*SECONDARY, *CORRECTED) if axis.score in more]
    known = [*AXES[:3], *set_axes(found), *refusal_axes(found, more), *asked, *AXES[3:], *UTILITY_AXES, *judged]
    # a column that no row has would only make the table wider
    return [axis for axis in known if any(cell([item], axis) for item in found)]


def of_scores(title: str, found: Mapping[str, Measured]) -> Table:
    """Every score of every run by its own name; the scores of judges and secondary readings among them."""
    from evaluator.statistics.comparison import Cell

    titles = {axis.score: axis.title for axis in known_axes(list(found.values()))}
    scores = {name: score for item in found.values() for name, score in item.scores.items()}
    columns = tuple(Column(name, titles.get(name, name), bool(score.get("higher_is_better", True)),
                           score.get("definition", "")) for name, score in scores.items())
    return Table(title, columns, tuple(Row(run, run, (f"seed {item.seed}",), {
        name: Cell(*(math.nan if score[key] is None else score[key] for key in ("value", "low", "high")), score["n"],
                   (score["value"],)) for name, score in item.scores.items()}) for run, item in found.items()))


def seed_names(line: Line) -> tuple[str, ...]:
    """What tells the parts of a row over several seeds apart: the run, else the seed, else its place."""
    return tuple(_seed_name(line, number, item) for number, item in enumerate(line.found))


def _seed_name(line: Line, number: int, item: Measured) -> str:
    if "+" in line.run:
        return item.folder.name
    return f"seed {item.seed}" if item.seed is not None else f"folder {number + 1}"


def differences(pairs: Sequence[tuple[Line, Line]], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every paired difference as data: row minus against, its interval, p before any correction, the shared rows.

    Args:
        pairs: (row, the row that it is compared with).
    """
    from evaluator.statistics.comparison import over_seeds

    return [{"row": a.label, "against": b.label, "column": axis.score, "value": d.value, "low": d.low, "high": d.high,
             "p": d.p, "n": d.n, "verdict": d.verdict(axis.higher)}
            for a, b in pairs for axis in axes if (d := over_seeds(a.found, b.found, axis))]


def comparisons(declared: Mapping[tuple[str, str], Outcome], *, row: str = "", against: str = "") -> list[dict[str, Any]]:
    """The declared comparisons of the findings as data, with p after Holm's correction over all of them.

    Args:
        declared: (column's title, the other row's label) -> outcome.
        row, against: the row that is in all of them, where it stands; the other one is the outcome's label.
    """
    return [{"column": title, "row": row or label, "against": against or label} | outcome.as_data()
            for (title, label), outcome in declared.items()]
