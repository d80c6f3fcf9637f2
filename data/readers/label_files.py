"""Answers that people labelled: does it decline, is it harmful, is it broken? By these a judge's errors are measured."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.escaped import read_answers
from data.readers.answer_files import COLUMNS
from data.readers.answer_text import answer_of
from data.readers.delimited import column_name
from data.readers.row_files import Problems, Row, read_rows
from errors import UserError

#: What is labelled, and the columns that may hold it, ours first; NAME_first and NAME_second: two passes by themselves.
LABELS: dict[str, tuple[str, ...]] = {
    "declines": ("declines", "label", "refusal", "refused", "human", "gold"),
    "harmful": ("harmful", "harm", "unsafe"),
    "broken": ("broken", "incoherent", "garbled"),
}
PASSES = ("first", "second")
#: Labelled answers of the embedded models, two blind passes: what ``own`` stands for.
OWN = Path(__file__).resolve().parents[1] / "labels" / "own_answers.jsonl"
#: A data frame writes a column with gaps as 1.0 and 0.0.
_WORDS = {"1": True, "1.0": True, "yes": True, "true": True, "0": False, "0.0": False, "no": False, "false": False}
_MISSING = ("", "none", "null", "nan", "<na>")


@dataclass(frozen=True)
class Labelled:
    """One labelled answer.

    Args:
        output: the answer, without reasoning, as judges read it.
        labels: declines, harmful, broken -> label; what was not labelled is not there.
        set: whose prompt it answers (safety, overrefusal, xstest ..); "": the file does not say.
        run: the row of results that gave it; "": the file does not say.
        prompt_hash: of prompt and input, as in the rows of scores; "": the file does not say.
        passes: one for each of two passes -> label name -> label.
    """

    output: str
    labels: dict[str, bool]
    set: str = ""
    run: str = ""
    id: str = ""
    prompt: str = ""
    prompt_hash: str = ""
    passes: tuple[dict[str, bool], dict[str, bool]] = ({}, {})


def read_labels(place: str, flag: str) -> list[Labelled]:
    """The labelled answers of a file, CSV, JSONL or JSON; ``own``: those of the embedded models that are kept with the code.

    Columns: the answer (``output`` and the like), one or more of declines, harmful, broken (1 or 0, yes or no, true or
    false; empty or null: not labelled), and, where known, set, run, id, prompt, prompt_hash and the passes' own labels.

    Raises:
        UserError: no such file, no column of outputs or labels, a label that is no yes or no, a row named twice, an
            answer labelled both ways.
    """
    file = OWN if place == "own" else Path(place).expanduser()
    if place == "own" and not file.is_file():
        raise UserError(f"{flag} own: {file} is not there; give a file of yours, {flag} FILE")
    problems = Problems()
    rows = read_rows(file, problems)
    if file.suffix.lower() == ".csv":
        # labels that were written beside the answers in the table of inference.py
        rows = [Row(fields, row.where) for row, fields in zip(rows, read_answers(row.fields for row in rows), strict=True)]
    keys = {column_name(str(key)): key for row in rows for key in row.fields}
    output = next((keys[name] for name in COLUMNS["output"] if name in keys), None)
    columns = {label: keys[found] for label, names in LABELS.items() if (found := next((n for n in names if n in keys), ""))}
    if output is None or not columns:
        wanted = ", ".join(COLUMNS["output"] if output is None else (names[0] for names in LABELS.values()))
        raise UserError(f"{flag} {place}: no column of {'outputs' if output is None else 'labels'}; it has "
                        f"{', '.join(map(str, keys.values()))}; call it one of: {wanted}")
    columns |= {f"{label}_{which}": keys[f"{label}_{which}"] for label in LABELS for which in PASSES
                if f"{label}_{which}" in keys}
    read = [label for row in rows if (label := _labelled(row, keys, output, columns, problems))]
    named = Counter((row.set, row.run, row.id) for row in read if row.run and row.id)
    for key in (key for key, times in named.items() if times > 1):
        problems.add(f"{file}: set {key[0]}, run {key[1]}, id {key[2]} is labelled more than once; keep one row")
    _contradictions(read, file, problems)
    problems.raise_if_any()
    return read


def _contradictions(rows: list[Labelled], file: Path, problems: Problems) -> None:
    """Note answers that are labelled both ways: the same text to the same prompt, of runs that are not told apart."""
    # an answer without a prompt may fit two of them, and decline one alone
    known: dict[tuple[str, ...], dict[str, bool]] = {}
    for row in rows:
        if not (row.prompt or row.prompt_hash or row.id):
            continue
        before = known.setdefault((row.set, row.run, row.id, row.prompt, row.prompt_hash, row.output), {})
        for name, label in row.labels.items():
            if before.setdefault(name, label) != label:
                said = row.prompt or row.prompt_hash or row.id
                problems.add(f"{file}: the answer {row.output[:40]!r} to {said[:40]!r} is labelled both 1 and 0 ({name}); "
                             "keep one of them")


def _labelled(row: Row, keys: dict[str, Any], output: Any, columns: dict[str, Any], problems: Problems) -> Labelled | None:
    text = row.fields.get(output)
    found: dict[str, bool] = {}
    for name, column in columns.items():
        value = row.fields.get(column)
        word = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
        if word in _MISSING:
            continue
        if word not in _WORDS:
            problems.add(f"{row.where}: column {column} needs a label 1 or 0 (yes or no), has {value!r}")
            return None
        found[name] = _WORDS[word]
    labels = {name: value for name, value in found.items() if name in LABELS}
    if not isinstance(text, str) or not labels:
        problems.add(f"{row.where}: needs an output that is text and a label 1 or 0 (yes or no)")
        return None
    said = {name: _plain(row.fields.get(keys[name]) if name in keys else None)
            for name in ("set", "run", "id", "prompt", "prompt_hash")}
    prompt = next((row.fields.get(keys[name]) for name in COLUMNS["prompt"] if name in keys), None)
    first, second = ({name: found[f"{name}_{which}"] for name in LABELS if f"{name}_{which}" in found} for which in PASSES)
    return Labelled(answer_of(text)[0], labels, **said | {"prompt": _plain(prompt)}, passes=(first, second))


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
