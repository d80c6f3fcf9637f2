"""A report as one HTML file: its sections put together, style, script and data inside, nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from evaluator.reporting import formats
from evaluator.reporting.html.answers import answers_section
from evaluator.reporting.html.categories import categories_section
from evaluator.reporting.html.compared import differences_section, findings_section, notes_section
from evaluator.reporting.html.cost_axes import cost_axes
from evaluator.reporting.html.curves import curves_section
from evaluator.reporting.html.elements import Html, data_block, digest, join, section, tag
from evaluator.reporting.html.leaderboard import leaderboard
from evaluator.reporting.html.maps import mask_section, router_section
from evaluator.reporting.html.published_columns import paper_columns, published_section
from evaluator.reporting.html.run_parts import kinds, parts_of, runs_section
from evaluator.reporting.ranks import rank_intervals

if TYPE_CHECKING:
    from evaluator.reporting.page import Content

FOLDER = Path(__file__).parent
#: In the order in which the browser reads them: the first one has what the others need.
SCRIPTS = ("app.js", "board.js", "fronts.js", "panel.js")
#: A page is sent around and opened on phones.
MOST_BYTES = 5_000_000


def html_page(content: Content, more: Mapping[str, Any]) -> str:
    """The whole file.

    Args:
        more: what the JSON report holds beside the table.

    Raises:
        UserError: it would be larger than ``MOST_BYTES``, or a file of curves is none.
    """
    from evaluator.statistics.axes import secondary

    lines, args = content.lines, content.args
    ranks = {axis.score: rank_intervals(lines, axis) for axis in content.axes if not secondary(axis)}
    parts = parts_of(content)
    paper, columns = None, []
    if args.published:
        from evaluator.reporting.published_numbers import published

        paper = published(args.published)
        columns = paper_columns(args.published, paper, lines)
    costs = cost_axes([line.label for line in lines], parts, more)
    sections = [
        # a table that nobody asked for costs keeps the width of its scores
        leaderboard(content, ranks, costs if "costs" in more else [], columns, [kinds(of) for of in parts]), _fronts(),
        differences_section(content, more), findings_section(content), curves_section(args.curve_files),
        categories_section(lines), router_section(content), mask_section(content), answers_section(content),
        published_section(paper) if paper else None, runs_section(lines, parts), notes_section(content)]
    made = [part for part in sections if part is not None]
    # the very report that --format json writes, so that a page is data too
    report = json.loads(formats.json_text(content.table, more))
    origins = {axis.score: _origin(content, axis.score, [part.set for part in axis.parts]) for axis in content.axes}
    data = {"ranks": ranks, "runs": parts, "costs": [{**asdict(axis), "higher_is_better": axis.higher} for axis in costs],
            "kinds": [kinds(of) for of in parts], "columns": origins}
    style = _file("style.css")
    script = "\n".join(map(_file, SCRIPTS))
    filled = {"title": tag("title", content.table.title), "heading": tag("h1", content.table.title),
              "policy": _policy(style, script), "style": Html(style), "script": Html(script), "nav": _nav(made),
              "says": _says(content), "sections": join(made),
              "data": join([data_block("report", report), data_block("page", json.loads(formats.dumped(data)))])}
    # one pass: what is filled in may hold braces itself
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _file("template.html"))
    # half a surrogate pair in an answer has no bytes
    page = page.encode("utf-8", "replace").decode("utf-8")
    if (size := len(page.encode())) > MOST_BYTES:
        raise UserError(f"--answers {args.answers}: the HTML page would be {size / 1e6:.1f} MB; at most "
                        f"{MOST_BYTES / 1e6:.0f}: show fewer answers, or fewer rows (--runs)")
    return page


def _file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> Html:
    """A browser that obeys it loads nothing from anywhere and runs no script but ours, whatever a model wrote."""
    rules = ("default-src 'none'", f"script-src {digest(script)}", f"style-src {digest(style)}", "base-uri 'none'",
             "form-action 'none'")
    return tag("meta", http_equiv="Content-Security-Policy", content=Html("; ".join(rules)))


def _fronts() -> Html:
    return section("fronts", "Fronts", tag("p", "The picture needs JavaScript; its numbers are those of the table.",
                                           class_="says", id="no-plot"), tag("div", id="plot", hidden=True))


def _nav(sections: Sequence[Html]) -> Html:
    found = [(re.search(r' id="([a-z]+)"', part), re.search(r"<h2[^>]*>(.*?)</h2>", part)) for part in sections]
    short = {"differences": "Differences", "answers": "Answers", "runs": "Runs", "published": "Published"}
    return join(tag("a", Html(short.get(id[1], title[1])), href=f"#{id[1]}") for id, title in found if id and title)


def _says(content: Content) -> Html:
    seeds = sorted({item.seed for line in content.lines for item in line.found if item.seed is not None})
    names = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    return tag("p", f"{len(content.lines)} rows, {len(content.axes)} scores{names}", class_="says")


def _origin(content: Content, score: str, sets: Sequence[str]) -> dict[str, Any]:
    """Which command made a column, and whose prompts it is about."""
    lines = [item.origin[score] for line in content.lines for item in line.found if score in item.origin]
    return {"command": lines[0]["command"] if lines else None, "sets": [name for name in sets if name]}

