"""Registry lines of scores and the rows behind them, checked: what is no score or no row is named and not read around."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError

#: A command is part of a file's name.
_COMMAND = re.compile(r"[\w@+,-][\w@+.,-]*")
#: Beyond this nothing that we measure lies, and sums of squares overflow.
_LARGEST = 1e12
#: What reports read of a line's details.
_ENDS = ("value", "low", "high")
_NESTED = ("judges", "baselines", "judged", "protocols", "made_with")


def score_lines(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each score of a score file, aligned: name, value, interval, number of rows."""
    width = max(map(len, scores), default=0)
    return "\n".join("  {:<{}}  {:7.3f}  [{:.3f}, {:.3f}]  n={}".format(
        name, width, *(math.nan if score[key] is None else score[key] for key in _ENDS), score.get("n"))
        for name, score in scores.items())


def checked_line(line: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """A registry line of a score, and a sentence on each number that is none (NaN, infinite): its cell is empty.

    Raises:
        UserError: everything about the line that is not as the evaluators write it.
    """
    problems = []
    if not isinstance(line.get("command"), str) or not _COMMAND.fullmatch(line["command"]):
        problems.append(f"the command {line.get('command')!r} is no name")
    if not all(line.get(key) is None or isinstance(line[key], kind) and not isinstance(line[key], bool)
               for key, kind in (("run", str), ("split", str), ("rows_sha256", str), ("seed", int))):
        problems.append("run, split and rows_sha256 must be text, seed a whole number")
    inputs, details = line.get("inputs") or {}, line.get("details", {})
    if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        problems.append("its inputs must be texts by name")
    problems += _details_problems(details) if isinstance(details, dict) else ["its details are no mapping"]
    scores = line.get("scores")
    if isinstance(scores, dict):
        problems += [f"score {name}: {problem}" for name, score in scores.items() for problem in _score_problems(score)]
    else:
        problems.append("its scores are no mapping")
    if problems:
        raise UserError(*(f"{where}: {problem}" for problem in problems[:20]),
                        f"{where}: score again with --overwrite, or take the line out of the registry")
    told = [f"{name}: its {key} is {score[key]}, no number" for name, score in scores.items()
            for key in _ENDS if score[key] is not None and not is_number(score[key])]
    return {**line, "scores": {name: {**score, **{key: score[key] if is_number(score[key]) else None for key in _ENDS}}
                               for name, score in scores.items()}}, told


def _details_problems(details: Mapping[str, Any]) -> list[str]:
    odd = [name for name in _NESTED if not _mappings(details.get(name, {}))]
    if odd:
        return [f"details {', '.join(odd)} must be mappings of mappings"]
    made, utility = details.get("made_with", {}), details.get("utility", {})
    problems = []
    if not _mappings(made.get("answers", {})):
        problems.append("details made_with.answers must be a mapping of mappings")
    if not isinstance(utility, dict) or not all(isinstance(v, dict) or is_number(v) for v in utility.values()):
        problems.append("details utility must be a mapping of mappings and numbers")
    counts = [details.get("sent", 0), *(judged.get("answers", 0) for judged in details.get("judged", {}).values())]
    numbers = [value for values in details.get("baselines", {}).values() for value in values.values()]
    if not all(map(is_number, [*counts, *numbers])):
        problems.append("details sent, judged and baselines must hold numbers")
    if not isinstance(details.get("annotator", ""), str):
        problems.append("details annotator must be text")
    return problems


def _mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values())


def _score_problems(score: Any) -> list[str]:
    if not isinstance(score, dict):
        return ["no mapping"]
    problems = [f"{key} is {score.get(key)!r}, must be a number or null" for key in _ENDS if key not in score
                or isinstance(score[key], bool) or not isinstance(score[key], int | float | None)]
    if is_number(score.get("low")) and is_number(score.get("high")) and score["low"] > score["high"]:
        problems.append(f"its interval [{score['low']:g}, {score['high']:g}] ends before it begins")
    if not isinstance(score.get("n"), int) or isinstance(score["n"], bool) or not 0 <= score["n"] <= _LARGEST:
        problems.append(f"n is {score.get('n')!r}, must be a count")
    if not isinstance(score.get("definition"), str) or not isinstance(score.get("higher_is_better"), bool):
        problems.append("needs a definition (text) and higher_is_better (true or false)")
    return problems


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that something measured can have."""
    # a NaN is in no order; a whole number may be too large for a float
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and a sentence on each value that could not be read.

    A value of which a row has no finite number is dropped from its whole set: a mean over the rest would be that of a
    selection. Rows of one set and id twice (answers of a file with repeated ids) are told apart: id, id#2, id#3.

    Raises:
        UserError: not JSON lines of {set, id, values}.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; run the evaluator that wrote it again") from None
    rows, problems, broken = [], [], Counter()
    seen: Counter[tuple[str, str]] = Counter()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if problem := _row_problem(row):
            problems.append(f"{path}, line {number}: {problem}")
            continue
        key = row["set"], str(row["id"])
        seen[key] += 1
        rows.append(row | {"id": key[1] if seen[key] == 1 else f"{key[1]}#{seen[key]}"})
        broken.update((key[0], name) for name, value in row["values"].items()
                      if not (isinstance(value, bool) or is_number(value)))
    if problems:
        raise UserError(*problems[:20], "run the evaluator that wrote it again")
    for row in rows:
        row["values"] = {name: value for name, value in row["values"].items() if (row["set"], name) not in broken}
    return rows, [f"{name} on {place}: {count} of {sum(row['set'] == place for row in rows)} rows have no finite number, so "
                  "no difference is made of it" for (place, name), count in broken.items()]


def _row_problem(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("set"), str) or not isinstance(row.get("values"), dict):
        return "no row of {set, id, values}"
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id"), str | int):
        return f"id {row.get('id')!r} is neither text nor a number"
    if not isinstance(row.get("category") or "", str) or not isinstance(row.get("prompt_hash") or "", str):
        return "category and prompt_hash must be text"
    tokens = row["values"].get("tokens", 1)
    if "nll" in row["values"] and ("tokens" not in row["values"] or not is_number(tokens) or tokens <= 0):
        return f"a likelihood over {tokens!r} tokens"
    return ""
