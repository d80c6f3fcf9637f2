"""Rows of prompts and answers from local files, read by shape: dialogs, question and answer, messages, instructions, CSV.

Every set of the paper is one of these shapes, so a set's name only says what its rows are for. A bad row is named by file
and line, all of them together; nothing is fetched and nothing repaired in silence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.readers.row_files import Problems, Row, read_rows
from data.records import SAFETY, Record

log = logging.getLogger(__name__)
#: Names that head a column of prompts.
HEADS = ("prompt", "prompts", "question", "questions", "instruction", "goal", "behavior", "text", "request",
         "forbidden_prompt")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Shape:
    """A kind of row: the columns of prompt, answer, input and system text; of each the first one that is there."""

    name: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    input: tuple[str, ...] = ()
    system: tuple[str, ...] = ("system",)

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether a row has this shape's prompt and answer."""
        return any(name in fields for name in self.prompt) and any(name in fields for name in self.answer)


#: In the order in which they are tried: a row may fit several.
SHAPES = (
    Shape("question and answer {question, answer}", ("question",), ("answer",), ("context",)),
    Shape("instructions {instruction, input, output}", ("instruction",), ("output", "response"), ("input", "context")),
    Shape("articles {document, summary}", ("document", "article"), ("summary", "highlights")),
    Shape("prompt and answer {prompt, answer}", ("prompt",), ("answer", "response", "completion", "output"), ("input",)),
)
KNOWN = "; ".join(["dialogs (a list of {role, content} turns per row, or {messages: [turns]})", *(s.name for s in SHAPES)])
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
    records = []
    for number, row in enumerate(rows):
        # sets differ in the capitals of their columns, not in what these mean
        fields = {str(key).strip().lower(): value for key, value in row.fields.items()}
        reader = _dialog if "messages" in fields or "conversations" in fields else _table
        if (record := reader(Row(fields, row.where), split, objective, f"{file.stem}-{number}", problems)) is not None:
            records.append(record)
    problems.raise_if_any()
    # reversed, so that of equal rows the first one is kept
    first = {(r.system, r.prompt, r.input, r.answer): r for r in reversed(records)}
    kept = [record for record in records if first[record.system, record.prompt, record.input, record.answer] is record]
    if len(kept) < len(records):
        log.warning("%s: %d rows repeat an earlier one and were dropped", file, len(records) - len(kept))
    return kept


def read_prompts(file: Path) -> list[str]:
    """The distinct prompts of a file, inputs included: a column of texts with or without header, or any known shape."""
    return list(dict.fromkeys(record.question for record in read_dialogs(file, "test", SAFETY)))


def _dialog(row: Row, split: str, objective: int, id: str, problems: Problems) -> Record | None:
    """One exchange: at most one system turn, then a user's and an assistant's (for tests the answer may lack)."""
    turns = row.fields.get("messages", row.fields.get("conversations"))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        problems.add(f"{row.where}: needs a list of turns, each {{role, content}}")
        return None
    spoken = [(_ROLES.get(str(turn.get("role", turn.get("from"))).lower(), "?"), turn.get("content", turn.get("value")))
              for turn in turns]
    roles = [role for role, _ in spoken]
    system = spoken[0][1] if roles[0] == "system" else ""
    body = roles[1:] if roles[0] == "system" else roles
    allowed = [["user", "assistant"]] + ([["user"]] if split == "test" else [])
    if body not in allowed:
        problems.add(f"{row.where}: its turns are {', '.join(roles)}; needed: (system,) user, assistant")
        return None
    if not all(isinstance(text, str) and text.strip() for _, text in spoken):
        problems.add(f"{row.where}: every turn needs content that is text and not blank")
        return None
    texts = dict(zip(roles, (text for _, text in spoken), strict=True))
    return Record(texts["user"], texts.get("assistant", ""), objective, id=id, system=system)


def _table(row: Row, split: str, objective: int, id: str, problems: Problems) -> Record | None:
    fields = row.fields
    shape = next((shape for shape in SHAPES if shape.fits(fields)), None)
    if shape is None and split == "test" and (head := next((name for name in HEADS if name in fields), None)):
        # a test needs no answer: a column of prompts will do
        shape = Shape(head, (head,), (), ("input", "context"))
    if shape is None:
        problems.add(f"{row.where}: fields {', '.join(fields) or 'none'} are no known shape; allowed: {KNOWN}")
        return None
    values = {}
    for part, names, needed in (("prompt", shape.prompt, True), ("answer", shape.answer, split == "train"),
                                ("input", shape.input, False), ("system", shape.system, False)):
        name = next((name for name in names if name in fields), None)
        value = "" if name is None or fields[name] is None else fields[name]
        if not isinstance(value, str) or (needed and not value.strip()):
            problems.add(f"{row.where}: field '{name}' needs text{' that is not blank' if needed else ''}")
            return None
        values[part] = value
    if "document" in shape.prompt:
        values["prompt"] = SUMMARISE + values["prompt"].strip()
    return Record(values["prompt"], values["answer"], objective, values["input"], id, system=values["system"])
