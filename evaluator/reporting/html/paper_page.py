"""A paper's table as one HTML file: nothing from elsewhere, no script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluator.reporting.html.elements import Html, digest, tag
from evaluator.reporting.html.page import FOLDER

if TYPE_CHECKING:
    from evaluator.reporting.beside import Beside


def paper_page(table: Beside) -> str:
    """The whole file: the table, then its notes."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src {digest(style)}; base-uri 'none'; form-action 'none'"
    left = len(table.keys)
    head = tag("tr", *(tag("th", text, scope="col", class_=None if i < left else "num")
                       for i, text in enumerate(table.head())))
    rows = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", text, class_="num" if left <= i < len(row) - 1 else None)
                                                        for i, text in enumerate(row) if i)) for row in table.body()]
    shown = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll", tabindex=0, role="region",
                aria_label=table.title)
    notes = tag("section", tag("h2", "Notes"), tag("ul", *(tag("li", note) for note in table.notes)))
    body = tag("body", tag("header", tag("h1", table.title)), tag("main", tag("section", shown), notes))
    top = tag("head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=Html(policy)),
              tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
              tag("meta", name="color-scheme", content="light dark"), tag("title", table.title), tag("style", Html(style)))
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"
