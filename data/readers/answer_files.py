"""Prompts with answers from a file that somebody else wrote: CSV, JSONL or JSON, whatever the two columns are called."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

from data.escaped import read_answers
from data.readers.answer_text import judged
from data.readers.columns import folded, tell_nothing
from data.readers.delimited import column_name
from data.readers.json_objects import DECODER
from data.readers.row_files import Problems, Row, read_rows, read_text
from data.readers.turns import is_turns
from errors import UserError

log = logging.getLogger(__name__)
#: Our field: the column names that may hold it, the published ones first.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompts", "prompt", "question", "questions", "instruction", "request", "goal", "que", "forbidden_prompt",
               "test_case"),
    "output": ("outputs", "output", "answer", "answers", "response", "responses", "completion", "completions", "generation",
               "ans"),
}
#: Keys under which a JSON file may hold its rows.
_WRAPPERS = ("data", "rows", "results", "samples", "examples", "train", "test", "answers", "outputs")
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
    file = Path(place).expanduser()
    rows = [_plain_row(row, problems) for row in _whole_json(file) or read_rows(file, problems)]
    if file.suffix.lower() == ".csv":
        rows = [Row(fields, row.where) for row, fields in zip(rows, read_answers(row.fields for row in rows), strict=True)]
    names = {ours: _column(rows[0], ours, place, flag) for ours in COLUMNS}
    answers = [_row(row, names, number, problems) for number, row in enumerate(rows)]
    problems.raise_if_any()
    if empty := sum(not row["output"].strip() for row in answers):
        log.warning("%s %s: %d of %d answers are empty; they count as broken text", flag, place, empty, len(answers))
    tell_nothing(f"{flag} {place}", {"answers": [(row["output"], row["id"]) for row in answers]})
    # scores are kept by id: of two rows with one id the later would take the earlier's place
    if len({row["id"] for row in answers}) < len(answers):
        log.warning("%s %s: ids repeat; rows are numbered instead", flag, place)
        answers = [row | {"id": str(number)} for number, row in enumerate(answers)]
    return judged(answers, f"{flag} {place}")


def _whole_json(file: Path) -> list[Row]:
    """Rows of a JSON file that is one object: {"data": [rows]}, pandas' columns or split, HarmBench's {id: [rows]}.

    Empty for any other file, whose rows are read one by one, with their lines.
    """
    if file.suffix.lower() not in (".json", ".jsonl"):
        return []
    text = read_text(file)
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict) or not value:
        return []
    # pandas' orient="split"
    if {"columns", "data"} <= value.keys() and isinstance(value["data"], list) and all(
            isinstance(row, list) and len(row) == len(value["columns"]) for row in value["data"]):
        return _numbered(file, [dict(zip(value["columns"], row, strict=True)) for row in value["data"]])
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows
             and all(isinstance(row, dict) for row in rows)}
    if len(lists) == 1 and next(iter(lists)) in _WRAPPERS:
        return _numbered(file, next(iter(lists.values())))
    # HarmBench: every key a behaviour, every value its test cases with their generations
    answer = (*COLUMNS["output"], "test_case")
    if len(lists) == len(value) and all(any(key in answer for key in row) for rows in lists.values() for row in rows):
        return [Row({**row, "id": key if len(rows) == 1 else f"{key}-{number}"}, f"{file}: {key}[{number}]")
                for key, rows in lists.items() for number, row in enumerate(rows)]
    # pandas' default, {column: {index: cell}}, or {column: [cells]}
    columns = {key: list(cells.values()) if isinstance(cells, dict) else cells for key, cells in value.items()
               if isinstance(cells, (dict, list))}
    if len(columns) == len(value) and len({len(cells) for cells in columns.values()}) == 1 and any(
            str(key).strip().lower() in COLUMNS["output"] for key in columns):
        return _numbered(file, [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)])
    # completions by behaviour alone, {id: [text, ..]}: an answer is judged beside its prompt
    if all(isinstance(cells, list) and cells and all(isinstance(cell, str) for cell in cells) for cells in value.values()):
        raise UserError(f"{file}: lists of texts under the keys {', '.join(map(str, list(value)[:4]))}, without the prompts "
                        "that they answer; give rows of a prompt and an answer, or HarmBench's {id: [{test_case, "
                        "generation}]}")
    # one row that was printed over several lines; on one line it is a file of one object a line
    if "\n" not in text.strip():
        return []
    if any(isinstance(cell, str) and str(key).strip().lower() in COLUMNS["output"] for key, cell in value.items()):
        return _numbered(file, [value])
    raise UserError(f"{file}: one JSON object with the keys {', '.join(map(str, list(value)[:8]))}, and no rows in it that "
                    f"are known; give a list of objects, one a line, or the rows under one of: {', '.join(_WRAPPERS)}")


def _numbered(file: Path, rows: list[dict[str, Any]]) -> list[Row]:
    return [Row(row, f"{file}: row {number}") for number, row in enumerate(rows, 1)]


def _plain_row(row: Row, problems: Problems) -> Row:
    """A row of lm-eval's samples, of HarmBench's results or of chat turns under the names of ours; any other as it is."""
    fields = row.fields
    if {"doc", "arguments", "resps"} <= fields.keys():
        return Row({"id": str(fields.get("doc_id", "")), "prompt": _lm_eval_prompt(fields["arguments"]),
                    "output": _lm_eval_answer(fields["resps"], row.where, problems)}, row.where)
    if {"test_case", "generation"} <= fields.keys():
        return Row({"id": fields.get("id", ""), "prompt": fields["test_case"], "output": fields["generation"],
                    "category": fields.get("semantic_category", "")}, row.where)
    turns = next((fields[key] for key in ("messages", "conversation", "conversations")
                  if isinstance(fields.get(key), list)), None)
    # the prompt's turns beside an answer in a column of its own are no dialog to take the answer from
    if turns is None or any(str(key).strip().lower() in COLUMNS["output"] for key in fields):
        return row
    spoken = [(str(turn.get("role", turn.get("from"))).lower(), turn.get("content", turn.get("value")))
              for turn in turns if isinstance(turn, dict)]
    roles = [role for role, _ in spoken if role != "system"]
    if len(roles) != 2 or roles[0] not in ("user", "human") or roles[1] not in ("assistant", "gpt", "model"):
        problems.add(f"{row.where}: the turns are {', '.join(roles) or 'none'}; an answer is judged beside its own prompt: "
                     "give one user turn and one assistant turn a row, after a system turn if there is one")
        return Row({"prompt": "-", "output": ""}, row.where)
    prompt, output = (_turn_text(content) for role, content in spoken if role != "system")
    rest = {name: fields[name] for name in _OPTIONAL if name in fields}
    return Row({**rest, "prompt": prompt, "output": output}, row.where)


def _asked(value: Any) -> Any:
    """The text of a prompt that is a list of one user turn, after a system turn if there is one; others as they are."""
    if not is_turns(value):
        return value
    spoken = [(str(turn.get("role", turn.get("from"))).lower(), turn.get("content", turn.get("value")))
              for turn in ([value] if isinstance(value, dict) else value)]
    asked = [content for role, content in spoken if role not in ("system", "developer")]
    return _turn_text(asked[0]) if len(asked) == 1 and spoken[-1][0] in ("user", "human") else value


def _only(value: Any) -> Any:
    """The one text of a list, as programs write that could give several answers; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _turn_text(content: Any) -> Any:
    """Text of a turn, also of one in parts; anything else is refused as a cell that is no text."""
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _lm_eval_prompt(arguments: Any) -> Any:
    """{"gen_args_0": {"arg_0": prompt}} of today's files, [[prompt, settings]] of older ones."""
    first = arguments.get("gen_args_0") if isinstance(arguments, dict) else None
    if isinstance(first, dict):
        return first.get("arg_0")
    if isinstance(arguments, list) and arguments:
        first = arguments[0][0] if isinstance(arguments[0], list) and arguments[0] else arguments[0]
    return first


def _lm_eval_answer(resps: Any, where: str, problems: Problems) -> Any:
    """The generated text: not filtered_resps, which may be an extracted number or letter."""
    flat = resps[0] if isinstance(resps, list) and len(resps) == 1 else resps
    if isinstance(flat, list) and len(flat) == 1 and isinstance(flat[0], str):
        return flat[0]
    if isinstance(flat, str):
        return flat
    problems.add(f"{where}: resps holds {'several texts or ' if isinstance(flat, list) else ''}no generated text "
                 "(likelihoods of choices are none); give the samples of a generate_until task with one answer a prompt")
    return ""


def _column(row: Row, ours: str, place: str, flag: str) -> str:
    # headers come with spaces, capitals and underscores as their authors liked
    keys = {column_name(str(key)): key for key in row.fields}
    try:
        folded(row.fields)
    except ValueError as error:
        raise UserError(f"{row.where}: {error}") from None
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
    if lacking := [name for name in names.values() if name not in row.fields]:
        problems.add(f"{row.where}: no column {' and none '.join(map(str, lacking))}, which the first row has; it has "
                     f"{', '.join(map(str, row.fields)) or 'none'}")
        return {"output": "", "id": str(number)}
    before = len(problems.found)
    prompt, output = (_text(row, names[ours], ours, problems) for ours in ("prompt", "output"))
    if not prompt.strip() and len(problems.found) == before:
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


def _text(row: Row, column: Any, ours: str, problems: Problems) -> str:
    value = row.fields[column]
    value = _asked(value) if ours == "prompt" else _only(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        turns = ours == "prompt" and is_turns(value)
        problems.add(f"{row.where}: column {column} is a {type(value).__name__} and needs text"
                     f"{': a prompt is one user turn, after a system turn if there is one' if turns else ''}")
        return ""
    return "" if value.strip().lower() in _MISSING else value


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else ""
