"""A paper's table: for each of its columns our score and the published number, each with where it comes from.

Published numbers come from data/published_numbers alone; a cell of ours that could not be made is empty and says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from data import escaped
from evaluator.reporting import formats
from evaluator.reporting.published_numbers import Cell as Published
from evaluator.reporting.published_numbers import published
from evaluator.statistics import crossed, metrics

if TYPE_CHECKING:
    from evaluator.statistics.axes import Axis, Measured


@dataclass(frozen=True)
class Ours:
    """A score of ours: value and 95 % interval in the column's unit, prompts, or why there is none."""

    value: float | None = None
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    run: str = ""
    why: str = ""


@dataclass(frozen=True)
class Beside:
    """A table of two halves.

    Args:
        ours: column -> what we measure there; a column that was measured nowhere is absent.
        rows: key -> column -> (our cell, the published one; None where the paper has no such cell).
    """

    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    ours: Mapping[str, str]
    theirs: tuple[str, ...]
    rows: Mapping[tuple[str, ...], Mapping[str, tuple[Ours, Published | None]]]
    notes: tuple[str, ...]

    def head(self) -> list[str]:
        """Titles of all columns: the key, then ours and theirs by turns."""
        sides = [side for name in self.columns for side in self._sides(name)]
        return [*self.keys, *sides, "empty because"]

    def _sides(self, name: str) -> list[str]:
        found = [f"{name}: {self.ours[name]}" if self.ours[name] != name else name] if name in self.ours else []
        return found + ([f"{name}, published"] if name in self.theirs else [])

    def body(self) -> list[list[str]]:
        """The cells as text, in the order of ``head``."""
        lines = []
        for key, cells in self.rows.items():
            line = list(key)
            for name in self.columns:
                own, their = cells[name]
                line += [shown(own)] if name in self.ours else []
                line += [_published(their)] if name in self.theirs else []
            lines.append([*line, "; ".join(whys(cells))])
        return lines


def whys(cells: Mapping[str, tuple[Ours, Any]]) -> list[str]:
    """Each reason for an empty cell of ours once, with the columns where it does not hold for all."""
    by_reason: dict[str, list[str]] = {}
    for name, (own, _) in cells.items():
        if own.value is None:
            by_reason.setdefault(own.why or "not scored", []).append(name)
    return [why if len(names) == len(cells) else f"{', '.join(names)}: {why}" for why, names in by_reason.items()]


def shown(cell: Ours) -> str:
    """A cell of ours as people read it."""
    return "" if cell.value is None else formats.number(cell.value) + formats.interval(cell.low, cell.high)


def _published(cell: Published | None) -> str:
    return "" if cell is None or cell.value is None else f"{cell.value:g}" + (f" [{cell.mark}]" if cell.mark else "")


def table(spec: Mapping[str, Any], seeds: Mapping[str, Sequence[Measured]]) -> Beside:
    """The table of a spec.

    Args:
        spec: as ``workflow/paper_tables.py`` writes it: paper, table, title, keys, columns, notes, and rows of a key and of
            cells {column: {run, score, category, scale, offset, title, why}}.
        seeds: run -> what was measured of it, one per seed.

    Raises:
        UserError: no such paper.
    """
    paper = published(spec["paper"])
    known = paper.tables.get(spec["table"])
    axes = _axes(seeds)
    sums = _summaries(seeds)
    rows = {}
    for row in spec["rows"]:
        key = tuple(row["key"])
        theirs = known.rows.get(key, {}) if known else {}
        rows[key] = {name: (_ours(row["cells"].get(name, {}), seeds, axes, sums), theirs.get(name))
                     for name in spec["columns"]}
    titles = {name: cell["title"] for row in spec["rows"] for name, cell in row["cells"].items() if cell.get("title")}
    marks = {cell.mark for row in rows.values() for _, cell in row.values() if cell and cell.mark}
    notes = [*spec["notes"], *_sources(paper, known, marks)]
    return Beside(spec["title"], tuple(spec["keys"]), tuple(spec["columns"]), titles, known.columns if known else (), rows,
                  tuple(note for note in notes if note))


def _sources(paper: Any, known: Any, marks: set[str]) -> list[str]:
    """Where the published half comes from, and what its marks mean."""
    if known is None:
        return [f"Published: no numbers of {paper.paper} (arXiv {paper.arxiv}) are known here for this table; its columns "
                "are ours."]
    arrow = "higher is better" if known.higher_is_better else "lower is better"
    said = f"Published: {paper.paper} (arXiv {paper.arxiv}); {known.unit}, {arrow}; {paper.provenance[known.provenance]}."
    return [said + (f" {known.note}." if known.note else ""),
            "Other models, data and judges than ours: beside them, not in one ranking with them.",
            *(f"Mark {mark}: {paper.marks[mark]}." for mark in sorted(marks))]


def _axes(seeds: Mapping[str, Sequence[Measured]]) -> dict[str, Axis]:
    from evaluator.reporting.table import known_axes
    from flags.evaluate import COLUMNS

    return {axis.score: axis for axis in known_axes([item for found in seeds.values() for item in found], COLUMNS)}


def _summaries(seeds: Mapping[str, Sequence[Measured]]) -> Mapping[str, Mapping[str, Any]]:
    from evaluator.reporting.summary_numbers import summary

    scored = {run: found for run, found in seeds.items() if all(item.scores for item in found)}
    return summary(scored).scores if scored else {}


def _ours(cell: Mapping[str, Any], seeds: Mapping[str, Sequence[Measured]], axes: Mapping[str, Axis],
          sums: Mapping[str, Mapping[str, Any]]) -> Ours:
    from evaluator.statistics.comparison import cell as over_all_seeds

    if cell.get("why") or not cell.get("run"):
        return Ours(why=cell.get("why", ""))
    run, score, found = cell["run"], cell["score"], seeds[cell["run"]]
    # a mean over fewer seeds than its neighbours' would stand beside them unnoticed
    there = [item for item in found if score in item.scores]
    if score in sums.get(run, {}):
        value = sums[run][score]
        value, low, high, n = value.value, value.low, value.high, value.n
    elif len(there) < len(found):
        return Ours(run=run, why="not scored" if not there else f"scored with {len(there)} of {len(found)} seeds")
    elif cell.get("category"):
        ends, n = _of_category(found, axes.get(score), cell["category"])
        if not n:
            return Ours(run=run, why=f"no prompt of the category {cell['category']}")
        value, low, high = crossed.over_seeds(ends)
    elif score in axes and (whole := over_all_seeds(found, axes[score])):
        value, low, high, n = whole.value, whole.low, whole.high, whole.n
    else:
        parts = [item.scores[score] for item in found]
        value, low, high = crossed.over_seeds([tuple(math.nan if part[end] is None else part[end]
                                                     for end in ("value", "low", "high")) for part in parts])
        n = parts[0]["n"]
    scale, offset = cell.get("scale", 1), cell.get("offset", 0)
    low, high = sorted((low * scale, high * scale)) if not math.isnan(low + high) else (math.nan, math.nan)
    return Ours(value * scale + offset, low + offset, high + offset, n, run)


def _of_category(found: Sequence[Measured], axis: Axis | None, category: str
                 ) -> tuple[list[tuple[float, float, float]], int]:
    """(value, low, high) of each seed over the prompts of one category, and how many there are."""
    ends, n = [], 0
    for item in found if axis else ():
        values = [row[axis.key] for (place, id), row in item.rows.items()
                  if place == axis.set and item.categories.get((place, id)) == category and axis.key in row]
        if not values:
            return [], 0
        made = metrics.mean(values, axis.score, "", higher_is_better=axis.higher, seed=item.seed or 0)
        ends.append((made.value, made.low, made.high))
        n = len(values)
    return ends, n


def markdown(table: Beside) -> str:
    """The page: title, table, notes."""
    lines = [f"# {escaped.markdown(table.title)}", "", *formats.markdown_lines(table.head(), table.body()), ""]
    return "\n".join([*lines, "## Notes", "", *(escaped.line(f"- {note}") for note in table.notes), ""])


def csv_text(table: Beside) -> str:
    """A line for each cell of either half, numbers at full precision."""
    import csv
    import io

    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*table.keys, "column", "side", "title", "value", "low", "high", "n", "run", "mark", "empty_because"])
    for key, cells in table.rows.items():
        for name, (own, their) in cells.items():
            ends = ["" if math.isnan(end) else end for end in (own.low, own.high)]
            blank = own.value is None
            line = [*key, name, "ours", table.ours.get(name, ""), "" if blank else own.value, *ends, "" if blank else own.n,
                    own.run, "", own.why if not blank else ""]
            writer.writerow([escaped.csv_cell(cell) for cell in line])
            if their is not None:
                value = "" if their.value is None else their.value
                line = [*key, name, "published", name, value, "", "", "", "", their.mark, ""]
                writer.writerow([escaped.csv_cell(cell) for cell in line])
    return file.getvalue()


def latex(table: Beside) -> str:
    """A LaTeX table with booktabs' rules; reasons stand in its note."""
    head, body = table.head()[:-1], [row[:-1] for row in table.body()]
    said = dict.fromkeys(row[-1] for row in table.body() if row[-1])
    rows = [" & ".join([f"{{{escaped.latex(row[0])}}}", *map(escaped.latex, row[1:])]) + r" \\" for row in [head, *body]]
    notes = "; ".join(escaped.latex(text) for text in (*table.notes, *(f"Empty: {why}" for why in said)))
    left = len(table.keys)
    return "\n".join([r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small",
                      rf"\caption{{{escaped.latex(table.title)}}}",
                      rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}", r"\toprule", rows[0], r"\midrule",
                      *rows[1:], r"\bottomrule", r"\end{tabular}", rf"\\ \footnotesize {notes}", r"\end{table}", ""])


def json_text(table: Beside) -> str:
    """Both halves as data; what is unknown is null."""
    rows = [{"key": dict(zip(table.keys, key, strict=True)), "cells": {
        name: {"ours": asdict(own), "published": asdict(their) if their else None} for name, (own, their) in cells.items()}}
        for key, cells in table.rows.items()]
    return formats.dumped({"title": table.title, "keys": table.keys, "columns": table.columns, "ours": dict(table.ours),
                           "published_columns": table.theirs, "rows": rows, "notes": table.notes}) + "\n"
