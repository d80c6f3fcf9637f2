"""The first table of a page: rows, scores with their intervals drawn, rank intervals, a paper's numbers beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evaluator.reporting.formats import interval, number
from evaluator.reporting.html.cost_axes import CostAxis
from evaluator.reporting.html.elements import Html, section, tag
from evaluator.reporting.html.published_columns import PaperColumn, shown_cell
from evaluator.reporting.limits import SAID, without_model

if TYPE_CHECKING:
    from evaluator.reporting.page import Content
    from evaluator.reporting.table import Column, Row
    from evaluator.statistics.axes import Axis
    from evaluator.statistics.comparison import Cell

#: Width and height of the picture of an interval, in pixels.
_WIDE, _HIGH = 56, 10
_SAYS = ("Bars are 95 % intervals, dots the values; press a number for the run behind it. Rank: the first and the "
         "last place that a row may have, by all pairs of rows on the axis, corrected by Holm. Tinted: no row "
         "is shown to be better.")
Ranks = Mapping[str, Sequence[tuple[int, int] | None]]


def leaderboard(content: Content, ranks: Ranks, costs: Sequence[CostAxis], papers: Sequence[PaperColumn],
                kinds: Sequence[str]) -> Html:
    """The table; it stands without a script, which adds sorting, a filter, a choice of columns and the panel of a cell.

    Args:
        ranks: score -> for each row its rank interval; scores without ranks are not in it.
        costs, papers: columns behind the scores.
        kinds: of each row, e.g. "adapter".
    """
    table, axes = content.table, content.axes
    bounds = {axis.score: _bounds(axis, [row.cells[axis.score] for row in table.rows if axis.score in row.cells])
              for axis in axes}
    head = [tag("th", "model", scope="col", class_="name"), *map(_head, table.columns), *map(_cost_head, costs),
            *map(_paper_head, papers)]
    body = [tag("tr", _name(row, kinds[at], at), *(_cell(row, column, bounds[column.name], _rank(ranks, column, at), at)
                                                   for column in table.columns),
                *(tag("td", cost.shown(at), class_="num", data_v=_plain(cost.values[at])) for cost in costs),
                *(tag("td", *shown_cell(cell := paper.cells[at]), class_="num paper", data_v=_plain(cell and cell.value))
                  for paper in papers), data_row=at)
            for at, row in enumerate(table.rows)]
    foot = [tag("tr", tag("th", f"({name})", scope="row", class_="name", title=SAID.get(name)),
                *(tag("td", number(value), class_="num") for value in values), *(tag("td") for _ in (*costs, *papers)))
            for name, values in without_model(content.lines, axes).items()]
    whole = tag("table", tag("caption", f"{table.title}: scores of {len(table.rows)} rows", class_="unseen"),
                tag("thead", tag("tr", *head)), tag("tbody", *body), tag("tfoot", *foot) if foot else None, id="board")
    return section("leaderboard", "Leaderboard", tag("div", id="tools", hidden=True),
                   tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="leaderboard"), says=_SAYS)


def _head(column: Column) -> Html:
    return tag("th", kept_together(column.title), scope="col", class_="num", title=column.definition or None,
               data_score=column.name, data_higher=str(column.higher).lower())


def _cost_head(cost: CostAxis) -> Html:
    return tag("th", kept_together(cost.title), scope="col", class_="num", data_higher=str(cost.higher).lower())


def kept_together(title: str) -> str:
    """A title whose arrow stays with its last word."""
    return re.sub(" ([↑↓])$", "\u00a0\\1", title)


def _paper_head(paper: PaperColumn) -> Html:
    return tag("th", tag("span", "published", class_="mark"), " ", kept_together(paper.title), scope="col",
               class_="num paper", data_higher=str(paper.table.higher_is_better).lower())


def _name(row: Row, kind: str, at: int) -> Html:
    return tag("th", tag("a", row.label, href=f"#run-{at}"), tag("small", kind), scope="row", class_="name")


def _cell(row: Row, column: Column, bounds: tuple[float, float], rank: tuple[int, int] | None, at: int) -> Html:
    cell = row.cells.get(column.name)
    if cell is None:
        return tag("td", class_="num", data_v="")
    known = sum(value is not None for value in cell.per_seed)
    # a mean over fewer seeds must not look like one over all
    partial = tag("small", f"{known} of {len(row.seeds)} seeds", class_="mark") if known < len(row.seeds) else None
    place = f"rank {rank[0]}" + (f"–{rank[1]}" if rank[1] != rank[0] else "") if rank else None
    return tag("td", bar(cell.value, cell.low, cell.high, bounds),
               tag("a", tag("b", number(cell.value, column.signed)), href=f"#run-{at}", data_score=column.name),
               tag("small", interval(cell.low, cell.high).strip(), class_="ci"), partial,
               tag("small", place, class_="rank") if place else None,
               class_="num top" if rank and rank[0] == 1 else "num", data_v=_plain(cell.value))


def bar(value: float, low: float, high: float, bounds: tuple[float, float]) -> Html:
    """An interval as a small picture on the scale of its column; the numbers beside it say the same."""
    ends = [line for line in (low, high) if not math.isnan(line)]
    inner = [tag("line", x1=0, x2=_WIDE, y1=5, y2=5, class_="scale")]
    if len(ends) == 2:
        left, right = (_at(end, bounds) for end in ends)
        inner.append(tag("rect", x=f"{left:.1f}", y=3, width=f"{max(right - left, 1):.1f}", height=4, rx=2, class_="span"))
    inner.append(tag("circle", cx=f"{_at(value, bounds):.1f}", cy=5, r=3, class_="dot"))
    return tag("svg", *inner, class_="bar", width=_WIDE, height=_HIGH, viewBox=f"0 0 {_WIDE} {_HIGH}", aria_hidden="true")


def _at(value: float, bounds: tuple[float, float]) -> float:
    share = (value - bounds[0]) / (bounds[1] - bounds[0])
    # a dot on the edge stays whole
    return 3 + (_WIDE - 6) * min(max(share, 0.0), 1.0)


def _bounds(axis: Axis, cells: Sequence[Cell]) -> tuple[float, float]:
    """The scale of a column: 0 to 1 for shares, from -1 where one is below 0, else what its intervals take up."""
    values = [value for cell in cells for value in (cell.value, cell.low, cell.high) if not math.isnan(value)]
    low, high = axis.bounds
    if math.isfinite(low) and math.isfinite(high):
        return (0.0 if min(values, default=0.0) >= 0 else low), high
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rank(ranks: Ranks, column: Column, at: int) -> tuple[int, int] | None:
    return ranks[column.name][at] if column.name in ranks else None


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"
