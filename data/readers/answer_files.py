"""Prompts with answers from a file that somebody else wrote: CSV, JSONL or JSON, whatever the two columns are called."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

from data.readers.row_files import Problems, Row, read_rows
from errors import UserError

log = logging.getLogger(__name__)
#: Our field: the column names that may hold it, the published ones first.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompts", "prompt", "question", "questions", "instruction", "request", "goal", "que"),
    "output": ("outputs", "output", "answer", "answers", "response", "responses", "completion", "completions", "generation",
               "ans"),
}
_OPTIONAL = ("id", "category", "input", "reference")
#: How a missing cell is written by programs that know no empty text.
_MISSING = {"nan", "<na>"}
#: Valid in JSON ("\\ud83d"), no character, and in no UTF-8 file: nothing could be hashed or written later.
_HALF = re.compile("[\ud800-\udfff]")


def read_answer_file(place: str, flag: str) -> list[dict[str, Any]]:
    """Rows {id, prompt, input, reference, category, finish, output} of a file of answers, in file order.

    A missing answer (an empty cell, NaN, null) is the empty answer ""; their number is logged. A row needs a prompt.

    Args:
        flag: the flag that named the file, for messages.

    Raises:
        UserError: with every problem and its line: no such file, not UTF-8, ragged or broken rows, a column that is
            missing or named twice, a cell that is no text or holds half of a surrogate pair.
    """
    problems = Problems()
    rows = read_rows(Path(place).expanduser(), problems)
    names = {ours: _column(rows[0], ours, place, flag) for ours in COLUMNS}
    answers = [_row(row, names, number, problems) for number, row in enumerate(rows)]
    problems.raise_if_any()
    if empty := sum(not row["output"].strip() for row in answers):
        log.warning("%s %s: %d of %d answers are empty; they count as broken text", flag, place, empty, len(answers))
    # scores are kept by id: of two rows with one id the later would take the earlier's place
    if len({row["id"] for row in answers}) < len(answers):
        log.warning("%s %s: ids repeat; rows are numbered instead", flag, place)
        answers = [row | {"id": str(number)} for number, row in enumerate(answers)]
    return answers


def _column(row: Row, ours: str, place: str, flag: str) -> str:
    # headers come with spaces, capitals and underscores as their authors liked
    keys = {str(key).strip().lower().replace(" ", "_"): key for key in row.fields}
    there = [name for name in COLUMNS[ours] if name in keys]
    if not there:
        has = ", ".join(filter(None, keys)) or "no named column"
        raise UserError(f"{flag} {place}: no column of {ours}s; it has {has}; call it one of: {', '.join(COLUMNS[ours])}")
    # our own names win; between other names only the user can tell (a reference answer beside the model's)
    if len(there) > 1 and there[0] not in COLUMNS[ours][:2]:
        raise UserError(f"{flag} {place}: {' and '.join(there)} may both hold the {ours}s; rename the right one to "
                        f"{COLUMNS[ours][0]}")
    return keys[there[0]]


def _row(row: Row, names: dict[str, Any], number: int, problems: Problems) -> dict[str, Any]:
    prompt, output = (_text(row, names[ours], problems) for ours in ("prompt", "output"))
    if not prompt.strip():
        problems.add(f"{row.where}: the prompt (column {names['prompt']}) is empty; every answer needs its prompt")
    # a CSV written by pandas keeps its index in a column without a name
    extra = {name: _plain(row.fields.get(name)) for name in _OPTIONAL}
    cells = {**extra, "id": extra["id"] or _plain(row.fields.get("")) or str(number), "finish": "", "prompt": prompt,
             "output": output}
    for ours, value in cells.items():
        if half := _HALF.search(value):
            problems.add(f"{row.where}: column {names.get(ours, ours)} holds half of a surrogate pair "
                         f"(\\u{ord(half[0]):04x}), which is no character; write the whole pair, or take it out")
    return cells


def _text(row: Row, column: Any, problems: Problems) -> str:
    value = row.fields.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        problems.add(f"{row.where}: column {column} is a {type(value).__name__} and needs text")
        return ""
    return "" if value.strip().lower() in _MISSING else value


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else ""
