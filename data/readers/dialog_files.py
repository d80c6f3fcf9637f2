"""Rows of prompts and answers from local files, read by shape: dialogs, question and answer, messages, instructions, CSV.

Every set of the paper is one of these shapes, so a set's name only says what its rows are for. A bad row is named by file
and line, all of them together; nothing is fetched and nothing repaired in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.readers.columns import HISTORY, SYSTEM, folded, refused, tell_unread
from data.readers.row_files import Problems, Row, read_rows
from data.readers.turns import TURNS, Exchange, empty, exchange, history_of, is_turns, read_turns
from data.records import SAFETY, Record

log = logging.getLogger(__name__)
#: Names that head a column of prompts.
HEADS = ("prompt", "prompts", "question", "questions", "instruction", "goal", "behavior", "text", "request",
         "forbidden_prompt")


class UnknownShape(ValueError):
    """A row whose columns are of no shape that is read."""


@dataclass(frozen=True)
class Shape:
    """A kind of row: the columns of prompt, answer, input and system text; of each the first one that is there."""

    name: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    input: tuple[str, ...] = ()
    system: tuple[str, ...] = SYSTEM

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether a row has this shape's prompt and answer."""
        return any(name in fields for name in self.prompt) and any(name in fields for name in self.answer)


#: In the order in which they are tried: a row may fit several.
SHAPES = (
    Shape("question and answer {question, answer}", ("question",), ("answer",), ("context",)),
    Shape("instructions {instruction, input, output}", ("instruction",), ("output", "response"), ("input", "context")),
    Shape("articles {document, summary}", ("document", "article"), ("summary", "highlights")),
    Shape("prompt and answer {prompt, answer}", ("prompt",), ("answer", "response", "completion", "output"), ("input",)),
    Shape("query and response {query, response}", ("query",), ("response", "answer"), ("input",)),
    Shape("question and response {question, response}", ("question",), ("response",), ("context",)),
)
KNOWN = "; ".join(["dialogs (a list of {role, content} turns per row, or {messages: [turns]}; or from and value)",
                   *(s.name for s in SHAPES)])
#: What is asked of an article in a row without a request (the published XSum set has the request in its dialogs).
SUMMARISE = "Summarise the following article in one sentence.\n\n"


def read_dialogs(file: Path, split: str, objective: int) -> list[Record]:
    """The records of a file of any known shape, in file order.

    Args:
        split: train: every row needs an answer; test: rows of prompts alone are fine too.

    Raises:
        UserError: with every problem and its line.
    """
    problems = Problems()
    rows = read_rows(file, problems, turns=True, bare=HEADS)
    records = records_of_rows(rows, split, objective, file.stem, problems)
    problems.raise_if_any()
    kept = without_repeats(records)
    if len(kept) < len(records):
        log.warning("%s: %d rows repeat an earlier one and were dropped", file, len(records) - len(kept))
    return kept


def without_repeats(records: Sequence[Record]) -> list[Record]:
    """The first of equal rows, in order."""
    def key(r: Record) -> tuple:
        return r.system, r.history, r.prompt, r.input, r.answer

    # reversed, so that of equal rows the first one is kept
    first = {key(r): r for r in reversed(records)}
    return [record for record in records if first[key(record)] is record]


def records_of_rows(rows: Sequence[Row], split: str, objective: int, name: str, problems: Problems) -> list[Record]:
    """The record of each row of a known shape, in order; every other row is a problem.

    Args:
        name: begins the records' ids.
    """
    records, read = [], {*TURNS, *SYSTEM, *HISTORY}
    strange: dict[str, list[int]] = {}  # sentence -> its place among the problems, number of rows
    for number, row in enumerate(rows):
        try:
            fields = folded(row.fields)
        except ValueError as error:
            problems.add(f"{row.where}: {error}")
            continue
        turns = [column for column in TURNS if not empty(fields.get(column))]
        if not turns and not any(shape.fits(fields) for shape in SHAPES):
            turns = [column for column in TURNS if column in fields]
        try:
            found, extra, used = _dialog(fields, turns, split) if turns else _table(fields, split)
        except UnknownShape as error:
            # a wrong header is wrong in every row: it is said once
            if str(error) not in strange:
                strange[str(error)] = [len(problems.found), 0]
                problems.add(f"{row.where}: {error}")
            strange[str(error)][1] += 1
            continue
        except ValueError as error:
            problems.add(f"{row.where}: {error}")
            continue
        read |= used
        wrong = refused(fields, used, split)
        for sentence in wrong:
            problems.add(f"{row.where}: {sentence}")
        if not wrong:
            records.append(Record(found.prompt, found.answer, objective, extra, f"{name}-{number}", system=found.system,
                                  history=found.history))
    for place, count in strange.values():
        problems.found[place] += f" ({count - 1} more rows have the same fields)" if count > 1 else ""
    if not problems.found:
        tell_unread(name, (str(key).strip().lower() for row in rows for key in row.fields), read)
    return records


def read_prompts(file: Path) -> list[str]:
    """The distinct prompts of a file, inputs included: a column of texts with or without header, or any known shape."""
    return list(dict.fromkeys(record.question for record in read_dialogs(file, "test", SAFETY)))


def _dialog(fields: dict[str, Any], columns: Sequence[str], split: str) -> tuple[Exchange, str, set[str]]:
    """A dialog, no input, and the columns that it was read of (for tests the last answer may lack)."""
    if len(columns) > 1:
        raise ValueError(f"has turns in {' and '.join(columns)}; drop one of them")
    found = exchange(read_turns(fields[columns[0]]), True if split == "train" else None)
    used = {columns[0], *(name for name in SYSTEM if name in fields)}
    if (shape := next((shape for shape in SHAPES if shape.fits(fields)), None)) is not None:
        raise ValueError(f"has turns in {columns[0]}, and is a row of {shape.name}, too; drop one of the two")
    return with_system(found, fields), "", used


def with_system(found: Exchange, fields: dict[str, Any]) -> Exchange:
    """A dialog with the system text that stands beside it."""
    system = system_of(fields)
    if system and found.system and system.strip() != found.system.strip():
        raise ValueError("has a system turn and another text in the column 'system'; drop one of them")
    return replace(found, system=found.system or system)


def system_of(fields: dict[str, Any]) -> str:
    """The system text of a row's own column; a ValueError where it is no text."""
    given = [name for name in SYSTEM if not empty(fields.get(name))]
    if len(given) > 1 or not all(isinstance(fields[name], str) for name in given):
        raise ValueError(f"field '{given[0]}' needs text, and there may be one system text")
    return fields[given[0]] if given else ""


def _table(fields: dict[str, Any], split: str) -> tuple[Exchange, str, set[str]]:
    shape = next((shape for shape in SHAPES if shape.fits(fields)), None)
    if shape is None and split == "test" and (head := next((name for name in HEADS if name in fields), None)):
        # a test needs no answer: a column of prompts will do
        shape = Shape(head, (head,), (), ("input", "context"))
    if shape is None:
        raise UnknownShape(f"fields {', '.join(fields) or 'none'} are no known shape; {_missing(fields)}allowed: {KNOWN}")
    names = {part: next((name for name in columns if name in fields), None)
             for part, columns in (("prompt", shape.prompt), ("answer", shape.answer), ("input", shape.input))}
    used = {name for name in names.values() if name} | {name for name in (*SYSTEM, *HISTORY) if name in fields}
    asked, answered = (None if (name := names[part]) is None else fields[name] for part in ("prompt", "answer"))
    if is_turns(asked):
        # TRL's dialogs: {prompt: [turns], completion: [turns]}
        turns = read_turns(asked)
        turns += read_turns(answered) if is_turns(answered) else [("assistant", text_of(names["answer"], answered, True))]
        return with_system(exchange(turns, True), fields), "", used
    if is_turns(answered):
        answered = _last_answer(asked, answered)
    values = [text_of(names["prompt"], asked, True),
              "" if names["answer"] is None else text_of(names["answer"], answered, split == "train", number=True),
              "" if names["input"] is None else text_of(names["input"], fields[names["input"]], False)]
    if "document" in shape.prompt:
        values[0] = SUMMARISE + values[0].strip()
    history = history_of(next((fields[name] for name in HISTORY if name in fields), None))
    return Exchange(values[0], values[1], system_of(fields), history), values[2], used


def _missing(fields: dict[str, Any]) -> str:
    """What a row with a prompt lacks; empty where it has none."""
    for head in HEADS:
        if head in fields and (names := [name for shape in SHAPES if head in shape.prompt for name in shape.answer]):
            return f"'{head}' lacks its answer: call that column {' or '.join(dict.fromkeys(names))}; "
    return ""


def _last_answer(asked: Any, answered: Any) -> str:
    """The text of one assistant turn that answers a prompt."""
    turns = read_turns(answered)
    if [role for role, _ in turns] != ["assistant"]:
        raise ValueError(f"the answer's turns are {', '.join(role for role, _ in turns)}; needed: assistant")
    return turns[0][1]


def text_of(name: str | None, value: Any, needed: bool, number: bool = False) -> str:
    """A field as text: None and NaN are no text; with ``number``, a whole number is its digits.

    Raises:
        ValueError: it is no text, blank where it is needed, or the ``nan`` that pandas writes for a missing one.
    """
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not needed and empty(value) and not isinstance(value, str):
        return ""
    if value == "nan":
        raise ValueError(f"field '{name}' is 'nan', which is how pandas writes a missing text; leave it empty")
    if not isinstance(value, str) or (needed and not value.strip()):
        raise ValueError(f"field '{name}' needs text{' that is not blank' if needed else ''}"
                         + (f"; the number {value} can be written in several ways, so write it as text"
                            if isinstance(value, float) and number and not empty(value) else ""))
    return value
