"""Refusals by the category of a prompt, for every set whose prompts have some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.sets.protocols import task_of
from evaluator.reporting.formats import interval, number
from evaluator.reporting.html.elements import Html, section, tag
from evaluator.statistics import crossed, metrics

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Measured

#: Prompts that a category needs to stand by itself: of fewer, a rate says nothing.
_LEAST = 5
_OTHER = "others"
#: Task of a set -> the value of its rows, and what the table is called.
_SHOWN = {"safety": ("safe_refusal", "refusal of harmful prompts ↑"),
          "overrefusal": ("refusal", "refusal of harmless prompts ↓")}
Place = tuple[str, str]


def categories_section(lines: Sequence[Line]) -> Html | None:
    """A table for each set: categories down, rows of the report across; None where no prompt has a category."""
    sets = sorted({name for line in lines for item in line.found for name, _ in item.categories if task_of(name) in _SHOWN})
    tables = [table for name in sets if (table := _table(name, lines)) is not None]
    return section("categories", "By category", *tables, says=(
        f"Categories with fewer than {_LEAST} prompts are counted together as {_OTHER}. Small print: 95 % intervals, "
        "Wilson's for one seed, crossed with the prompts for several; not corrected for their number.")) if tables else None


def _table(name: str, lines: Sequence[Line]) -> Html | None:
    key, title = _SHOWN[task_of(name)]
    groups = _groups(name, lines)
    if len(groups) < 2:
        return None
    head = tag("tr", tag("th", "category", scope="col", class_="name"), tag("th", "prompts", scope="col", class_="num"),
               *(tag("th", line.label, scope="col", class_="num") for line in lines))
    body = [tag("tr", tag("th", group, scope="row", class_="name"), tag("td", len(places), class_="num"),
                *(_cell(line.found, places, key) for line in lines)) for group, places in groups.items()]
    caption = f"{name}: {title}"
    return tag("div", tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)), class_="scroll",
               tabindex=0, role="region", aria_label=caption)


def _groups(name: str, lines: Sequence[Line]) -> dict[str, list[Place]]:
    """Category -> its prompts, by name; those of the small ones together at the end."""
    of = {place: category for line in lines for item in line.found for place, category in item.categories.items()
          if place[0] == name}
    counts = Counter(of.values())
    groups: dict[str, list[Place]] = {}
    # sorted: sums of floats must not depend on an order
    for place, category in sorted(of.items()):
        groups.setdefault(category if counts[category] >= _LEAST else _OTHER, []).append(place)
    return dict(sorted(groups.items(), key=lambda group: (group[0] == _OTHER, group[0])))


def _cell(found: Sequence[Measured], places: Sequence[Place], key: str) -> Html:
    seeds = [{place: item.rows[place][key] for place in places if key in item.rows.get(place, {})} for item in found]
    seeds = [values for values in seeds if values]
    if not seeds:
        return tag("td", class_="num")
    counts = [(int(sum(values.values())), len(values)) for values in seeds]
    ends = [(hits / n, *metrics.wilson(hits, n)) for hits, n in counts]
    value, low, high = crossed.over_seeds(ends, crossed.share_of([seeds]) if len(seeds) > 1 else 1.0)
    return tag("td", tag("b", number(value)), tag("small", interval(max(low, 0.0), min(high, 1.0)).strip(), class_="ci"),
               class_="num")
