"""The differences and the findings of a report, and its notes, as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluator.reporting.formats import interval, number
from evaluator.reporting.html.elements import Html, section, tag, words
from evaluator.reporting.html.leaderboard import kept_together
from evaluator.reporting.page import notes

if TYPE_CHECKING:
    from evaluator.reporting.page import Content

_SIGNS = {"better": "▲", "worse": "▼", "no difference": "·"}


def differences_section(content: Content, more: Mapping[str, Any]) -> Html | None:
    """A table of paired differences; None for a single row.

    Args:
        more: what the JSON report holds beside the table.
    """
    if len(content.lines) < 2:
        return None
    subject = content.ground or content.lines[-1]
    others = [a if content.ground else b for a, b in content.pairs]
    side = "row" if content.ground else "against"
    found = {(item[side], item["column"]): item for item in more["differences"]}
    held = {(item[side], item["column"]): item["verdict"] for item in more["findings"]["comparisons"]
            if subject.label in (item["row"], item["against"])}
    head = tag("tr", tag("th", side, scope="col", class_="name"),
               *(tag("th", kept_together(column.title), scope="col", class_="num") for column in content.table.columns))
    body = [tag("tr", tag("th", line.label, scope="row", class_="name"),
                *(_cell(found.get((line.label, column.name)), held.get((line.label, column.name),
                                                                    held.get((line.label, column.title))))
                  for column in content.table.columns)) for line in others]
    title = f"Every other row minus {subject.label}" if content.ground else f"{subject.label} minus each other row"
    return section("differences", title, tag(
        "div", tag("table", tag("caption", title, class_="unseen"), tag("thead", head), tag("tbody", *body)),
        class_="scroll", tabindex=0, role="region", aria_label=title),
        says="Paired on the same prompts; ▲ better, ▼ worse, · no difference shown. Filled: after Holm's correction over "
             "the comparisons of the findings; outlined (△ ▽): before it only, or not among them.")


def _cell(item: Mapping[str, Any] | None, after: str | None) -> Html:
    if item is None:
        return tag("td", class_="num")
    verdict = item["verdict"]
    sign = _SIGNS[verdict] if verdict == after or verdict == "no difference" else {"better": "△", "worse": "▽"}[verdict]
    said = verdict if sign in _SIGNS.values() else f"{verdict}, before the correction only or not among the findings"
    return tag("td", tag("b", number(item["value"], sign=True)), " ",
               tag("span", sign, class_=f"sign {verdict.split()[0]}", role="img", aria_label=said, title=said),
               tag("small", interval(item["low"], item["high"]).strip(), class_="ci"), class_="num")


def findings_section(content: Content) -> Html | None:
    """The sentences that the report concludes with; None for a single row."""
    return section("findings", "Findings", _sentences(content.findings)) if len(content.lines) > 1 else None


def notes_section(content: Content) -> Html:
    """What the columns are and how sure they are."""
    return section("notes", "Notes", _sentences(notes(content)))


def _sentences(lines: Sequence[str]) -> Html:
    return tag("ul", *(_item(words(line.removeprefix("- "))) for line in lines))


def _item(text: str) -> Html:
    # what a sentence is about stands before its first bracket or colon
    ends = [at for at in (text.find(" ("), text.find(": ")) if at > 0]
    end = min(ends, default=0)
    return tag("li", tag("strong", text[:end]), text[end:]) if 0 < end <= 60 else tag("li", text)
