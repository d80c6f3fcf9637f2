"""A paper's numbers beside ours: columns of their own, a cell where one of our rows is the paper's method, else empty."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evaluator.reporting.html.elements import Html, section, tag
from evaluator.reporting.published_numbers import Cell, Published, Table

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line

PLACES = Path(__file__).with_name("published_rows.yaml")


@dataclass(frozen=True)
class PaperColumn:
    """A column of the paper: its title, the table it is from, and a cell for each of our rows (None: no such row there)."""

    title: str
    table: Table
    cells: tuple[Cell | None, ...]


def paper_columns(name: str, paper: Published, lines: Sequence[Line]) -> list[PaperColumn]:
    """The columns of ``published_rows.yaml`` that one of our rows has a number in.

    Args:
        name: of the paper's file.
    """
    places = yaml.safe_load(PLACES.read_text(encoding="utf-8")).get(name, [])
    found = [_column(paper, place, shown, lines) for place in places for shown in place["show"]]
    return [column for column in found if any(cell and cell.value is not None for cell in column.cells)]


def _column(paper: Published, place: dict[str, Any], shown: str, lines: Sequence[Line]) -> PaperColumn:
    table = paper.tables[place["table"]]
    down = place["methods"] == "rows"
    rows = {" / ".join(key): cells for key, cells in table.rows.items()}
    cells = []
    for line in lines:
        method = next((theirs for theirs, ours in place["ours"].items() if _is(line, ours)), None)
        # a method that is one of ours and was not put to this test has no cell
        cells.append(rows.get(method, {}).get(shown) if down else rows[shown].get(method))
    arrow = "↑" if table.higher_is_better else "↓"
    title = f"{table.title}: {shown} ({table.unit}) {arrow}" if down else f"{shown} {arrow}"
    return PaperColumn(title, table, tuple(cells))


def _is(line: Line, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, name) for name in names for text in (line.label, line.run))


def shown_cell(cell: Cell | None) -> list[Any]:
    """A published cell: its value as printed and its mark."""
    if cell is None or cell.value is None:
        return []
    return [f"{cell.value:g}", tag("small", f"[{cell.mark}]", class_="mark") if cell.mark else None]


def published_section(paper: Published) -> Html:
    """All tables of the paper, each with its source, in folds."""
    marks = tag("ul", *(tag("li", f"[{mark}]: {why}") for mark, why in paper.marks.items()))
    tables = [tag("details", tag("summary", table.title), tag("p", _source(paper, table), class_="says"), _table(table))
              for table in paper.tables.values()]
    return section("published", f"Published: {paper.paper} (arXiv {paper.arxiv})", marks, *tables,
                   says="Other models, data and judges than the rows above: beside them, not in one ranking with them.")


def _source(paper: Published, table: Table) -> str:
    arrow = "higher is better" if table.higher_is_better else "lower is better"
    return f"{table.unit}, {arrow}; {paper.provenance[table.provenance]}." + (f" {table.note}." if table.note else "")


def _table(table: Table) -> Html:
    head = tag("tr", tag("th", " / ".join(table.keys), scope="col"), *(tag("th", c, scope="col", class_="num")
                                                                   for c in table.columns))
    body = [tag("tr", tag("th", " / ".join(key), scope="row"),
                *(tag("td", *shown_cell(cells[column]), class_="num") for column in table.columns))
            for key, cells in table.rows.items()]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0, role="region",
               aria_label=table.title)
