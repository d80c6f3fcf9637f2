"""The papers' summary numbers of all rows of a table: of one set and one judge in every row, or empty.

A number in two rows is compared by whoever reads the table. So each is made from one reading for all rows: that which most
rows have, the paper's own set where several are equal. Rows that lack it, or have it from other prompts or another version
of the judge than most, keep an empty cell, and a sentence says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from evaluator.statistics import aggregates
from evaluator.statistics.pairing import how_judged, how_scored

if TYPE_CHECKING:
    from evaluator.statistics.aggregates import Aggregate, Inputs
    from evaluator.statistics.axes import Measured
    from evaluator.statistics.metrics import Score

T = TypeVar("T")
#: {label of a row: one run per seed}
Rows = Mapping[str, Sequence["Measured"]]


@dataclass(frozen=True)
class Summary:
    """What stands below a table.

    Args:
        scores: {label: {name: score}}; a number that a row lacks is not in it.
        higher: {name: whether more is better}, of every number that some row has what it is made from.
        notes: a line for each number (what it is, made from what), then one for each that some rows cannot have.
    """

    scores: dict[str, dict[str, Score]]
    higher: dict[str, bool]
    notes: list[str]


def summary(rows: Rows) -> Summary:
    """Every summary number that some row has; over-refusal is a column of the table already."""
    chosen: dict[str, dict[str, Inputs]] = {label: {} for label in rows}
    made: dict[str, str] = {}
    higher: dict[str, bool] = {}
    left: list[str] = []
    for aggregate in aggregates.AGGREGATES:
        if aggregate.name == "overrefusal":
            continue
        picked, text, why = (_tasks if aggregate.tasks else _one_reading)(aggregate, rows)
        for label, inputs in picked.items():
            chosen[label][aggregate.name] = inputs
        made[aggregate.name] = text
        left += why
        if picked or why:
            higher[aggregate.name] = aggregate.higher_is_better
    scores = {label: aggregates.over_seeds(found, chosen[label]) for label, found in rows.items()}
    examples = {name: cells[name] for name in higher for cells in scores.values() if name in cells}
    return Summary(scores, higher, [f"- {name}: {score.definition}{made[name]}." for name, score in examples.items()] + left)


def _one_reading(aggregate: Aggregate, rows: Rows) -> tuple[dict[str, Inputs], str, list[str]]:
    """{label: inputs}, a text on them, and what was left out why."""
    possible = {label: found for label, seeds in rows.items() if (found := aggregates.common(aggregate, seeds))}
    if not possible:
        return {}, "", []
    counts = Counter(inputs for found in possible.values() for inputs in found)
    # most rows; among equals the first in the order of preference
    best = max(aggregate.candidates, key=lambda inputs: counts[inputs])
    titles = [f"{key} on {name}" for name, key in best]
    made = {label: tuple(_seeds_how(rows[label], *one) for one in best) if best in found else None
            for label, found in possible.items()}
    kept = most_alike(made, lambda a, b: a is not None and b is not None and all(map(_same, a, b)))
    texts = {label: [how.text for how in hows] if hows else ["not judged so"] * len(best) for label, hows in made.items()}
    said = texts[min(kept)] if kept else []
    text = "".join(f"; {title}: {how}" for title, how in zip(titles, said, strict=False))
    return ({label: best for label in made if label in kept}, text,
            _left_out(aggregate.name, titles, texts, kept, "not the same judge on the same prompts"))


def _tasks(aggregate: Aggregate, rows: Rows) -> tuple[dict[str, Inputs], str, list[str]]:
    """A mean over tasks compares models over the same tasks only, each on the same rows with the same shots."""
    names = aggregate.tasks
    run = {label: seeds for label, seeds in rows.items() if any(task in item.scores for item in seeds for task in names)}
    texts = {label: [" / ".join(dict.fromkeys(how_scored(item, task) for item in seeds)) for task in names]
             for label, seeds in run.items()}
    # seeds of one row that differ among themselves are like no other row
    even = {label: how if all(" / " not in text for text in how) else None for label, how in texts.items()}
    kept = most_alike(even, lambda a, b: a is not None and a == b)
    possible = {label: aggregates.common(aggregate, rows[label]) for label in kept}
    return ({label: found[0] for label, found in possible.items() if found}, "",
            _left_out(aggregate.name, names, texts, kept, "not the same tasks on the same rows"))


def most_alike(made: Mapping[str, T], same: Callable[[T, T], bool]) -> set[str]:
    """The labels whose making is that of most; none where no group is larger than any other. ``same(a, a)`` may be false."""
    groups: list[set[str]] = []
    for label, how in made.items():
        group = {other for other, its in made.items() if same(how, its)}
        if label in group and group not in groups:
            groups.append(group)
    groups.sort(key=len, reverse=True)
    return groups[0] if groups and (len(groups) == 1 or len(groups[0]) > len(groups[1])) else set()


def _left_out(name: str, titles: Sequence[str], texts: Mapping[str, Sequence[str]], kept: set[str], why: str) -> list[str]:
    empty = [label for label in texts if label not in kept]
    if not empty:
        return []
    differ = []
    for number, title in enumerate(titles):
        ways: dict[str, list[str]] = {}
        for label, found in texts.items():
            ways.setdefault(found[number], []).append(label)
        if len(ways) > 1 or any(" / " in way for way in ways):
            differ.append(f"{title}: " + "; ".join(f"{way} ({', '.join(labels)})" for way, labels in ways.items()))
    return [f"- {name} is left empty for {', '.join(empty)}: {why}. {'. '.join(differ)}."]


@dataclass(frozen=True)
class _How:
    """How a row was judged: the judge's versions, the prompts (id -> hash, "" where unknown), and how many were asked."""

    judge: tuple[str, ...]
    prompts: Mapping[str, str]
    asked: int
    even: bool

    @property
    def text(self) -> str:
        digest = hashlib.blake2b(repr(sorted(self.prompts.items())).encode(), digest_size=3).hexdigest()
        lost = self.asked - len(self.prompts)
        parts = [f"{self.asked} prompts ({digest})", f"{lost} of them unjudged" if lost else "", *self.judge]
        return ", ".join(part for part in parts if part) + ("" if self.even else " / other seeds otherwise")


def _seeds_how(seeds: Sequence[Measured], place: str, key: str) -> _How:
    found = []
    for item in seeds:
        prompts = {id: item.prompts.get((name, id), "") for (name, id), values in item.rows.items()
                   if name == place and key in values}
        facts, asked = how_judged(item, place, key)
        found.append(_How(tuple(facts), prompts, max(asked, len(prompts)), True))
    even = all(_same(found[0], other) for other in found[1:])
    return _How(found[0].judge, found[0].prompts, found[0].asked, even)


def _same(a: _How, b: _How) -> bool:
    """Whether two rows stand side by side: one judge, and the same prompts but for those that it could not judge."""
    if not (a.even and b.even and a.judge == b.judge and a.asked == b.asked):
        return False
    other = any(a.prompts[id] != b.prompts[id] for id in a.prompts.keys() & b.prompts.keys()
                if a.prompts[id] and b.prompts[id])
    return not other and len(a.prompts.keys() ^ b.prompts.keys()) <= a.asked - len(a.prompts) + b.asked - len(b.prompts)
