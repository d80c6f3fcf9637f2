"""One table written as Markdown, CSV, LaTeX or JSON. No writer looks a score up: all is in the table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data import escaped

if TYPE_CHECKING:
    from evaluator.reporting.table import Column, Row, Table

#: Columns of the long CSV: a line of level "model" is a cell of the table, one of level "seed" a part of it.
CSV_COLUMNS = ("model", "run", "score", "title", "higher_is_better", "level", "seed", "value", "low", "high", "n")
#: What --format can be -> the end of the file's name.
SUFFIXES = {"md": ".md", "csv": ".csv", "latex": ".tex", "json": ".json", "html": ".html"}


def number(value: float | None, sign: bool = False) -> str:
    """Three digits; empty for None and NaN."""
    return "" if value is None or math.isnan(value) else f"{value:{'+' if sign else ''}.3f}"


def interval(low: float, high: float) -> str:
    """" [low, high]" with three digits; empty where an end is unknown."""
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:.3f}, {high:.3f}]"


def p_text(p: float) -> str:
    """A p-value with three digits."""
    return "unknown" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def text_of(row: Row, column: Column) -> str:
    """A cell as people read it: value, interval, and how many seeds have it where not all do; empty where there is none."""
    if (cell := row.cells.get(column.name)) is None:
        return ""
    known = [value for value in cell.per_seed if value is not None]
    # a mean over fewer seeds must not look like one over all
    partial = f" ({len(known)} of {len(row.seeds)} seeds)" if len(known) < len(row.seeds) else ""
    if math.isfinite(column.most):
        return _until(cell.value, column) + f" [{_until(cell.low, column)}, {_until(cell.high, column)}]" + partial
    return number(cell.value, column.signed) + interval(cell.low, cell.high) + partial


def _until(value: float, column: Column) -> str:
    """A number of a column whose measuring ends; one digit, as steps have."""
    return f"> {column.most:g}" if math.isinf(value) else f"{value:.1f}"


def markdown_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    body = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(escaped.markdown, row)) + " |" for row in body]


def markdown(table: Table, more: Sequence[Sequence[str]] = ()) -> list[str]:
    """The table as Markdown.

    Args:
        more: further rows below it: a label and a text for each column.
    """
    rows = [[row.label, *(text_of(row, column) for column in table.columns)] for row in table.rows]
    return markdown_lines(["model", *(column.title for column in table.columns)], [*rows, *more])


def csv_text(table: Table, *_: Any) -> str:
    """The table in the long form of data frames: a line for each cell, and for each of its seeds where there are several.

    Numbers stand at full precision; what is unknown is empty. A text that a spreadsheet would run stands behind an
    apostrophe.
    """
    written: list[Sequence[Any]] = [CSV_COLUMNS]
    for row in table.rows:
        for column in table.columns:
            if (cell := row.cells.get(column.name)) is None:
                continue
            head = [row.label, row.run, column.name, column.title, column.higher]
            lines = [["model", "", cell.value, cell.low, cell.high, cell.n]]
            if len(row.seeds) > 1:
                lines += [["seed", seed, value, None, None, None]
                          for seed, value in zip(row.seeds, cell.per_seed, strict=True)]
            written += [[escaped.csv_cell(_blank(value)) for value in (*head, *line)] for line in lines]
    return "".join(map(_csv_line, written))


def _csv_line(cells: Sequence[Any]) -> str:
    # only a writer whose lines end in both quotes a carriage return within a cell, which would end the line
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\r\n").writerow(cells)
    return file.getvalue().removesuffix("\r\n") + "\n"


def latex(table: Table, *_: Any) -> str:
    """The table as a LaTeX table with booktabs' rules: value, and its interval in small type."""
    head = ["model", *(column.title for column in table.columns)]
    rows = [[escaped.latex(row.label), *(_latex_cell(row, column) for column in table.columns)] for row in table.rows]
    return "\n".join([
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small",
        rf"\caption{{{escaped.latex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", _latex_row(map(escaped.latex, head)), r"\midrule",
        *map(_latex_row, rows), r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_cell(row: Row, column: Column) -> str:
    value, bracket, rest = text_of(row, column).partition(" [")
    return value + (rf" {{\footnotesize [{rest}}}" if bracket else "")


def _latex_row(cells: Any) -> str:
    first, *rest = cells
    # behind \\ and \midrule a bracket or a star would be read as their option
    return " & ".join([f"{{{first}}}", *rest]) + r" \\"


def json_text(table: Table, more: Mapping[str, Any] | None = None) -> str:
    """The table as JSON, numbers at full precision, what is unknown as null; ``more``: further keys beside it."""
    content = {
        "title": table.title,
        "columns": [{"name": c.name, "title": c.title, "higher_is_better": c.higher, "definition": c.definition}
                    for c in table.columns],
        "rows": [{"label": row.label, "run": row.run, "seeds": list(row.seeds), "cells": {
            name: {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n, "per_seed": list(cell.per_seed)}
            for name, cell in row.cells.items()}} for row in table.rows],
        **(more or {})}
    return dumped(content) + "\n"


def dumped(content: Any) -> str:
    """JSON of anything: what is unknown or infinite is null."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)


#: What --format can be beside md, whose pages are their commands' own -> its writer.
WRITERS: dict[str, Callable[..., str]] = {"csv": csv_text, "latex": latex, "json": json_text}


def _blank(value: Any) -> Any:
    return "" if value is None or isinstance(value, float) and math.isnan(value) else value


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: both are null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
