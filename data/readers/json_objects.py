"""JSON files that begin with an object: rows over several lines, one object that holds all rows, or pandas' columns."""

from __future__ import annotations

import json
from typing import Any

from data.readers.turns import is_turns

#: Names under which a file holds its rows; under another name a list of objects is rows, too, if it is the only value.
WRAPPERS = ("data", "rows", "train", "examples", "instances", "samples", "items", "records", "questions", "dataset")


class Twice(ValueError):
    """An object that names a field twice: a decoder keeps the last one and says nothing."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Twice(f"an object names '{next(name for name in names if names.count(name) > 1)[:60]}' twice")
    return found


#: JSON as it is read here.
DECODER = json.JSONDecoder(object_pairs_hook=_once)


class Damaged(Exception):
    """An object after the first one that is no JSON: its line, and the decoder's error."""

    def __init__(self, line: int, reason: Exception) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


def spread_objects(text: str) -> list[tuple[Any, int, int]] | None:
    """(value, line, characters) of every object; None where the file is one object a line, or damaged in its first one.

    A file of one object is given back, too, on however many lines it stands.

    Raises:
        Damaged: an object that follows one over several lines.
    """
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "{":
        return None
    decoder = DECODER
    at, line, counted = start, 1, 0
    found: list[tuple[Any, int, int]] = []
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # an object over several lines has no line of its own that the reader of lines could name
            if not found and not (isinstance(error, Twice) and "\n" in text.strip()):
                return None
            raise Damaged(line, error) from None
        rest = end
        while rest < len(text) and text[rest] in " \t\r\n":
            rest += 1
        # one object a line: the reader of lines names damage by its line, and takes what is good around it
        if not found and "\n" not in text[at:end] and rest < len(text):
            return None
        found.append((value, line, end - at))
        at = rest
    return found


def rows_within(value: dict[str, Any]) -> list[Any] | None:
    """The rows of an object such as {"data": [..]} or {"version": 1, "train": [..]}; None where it is a row itself.

    Raises:
        ValueError: it holds several lists of rows.
    """
    def holds(name: str, rows: Any) -> bool:
        if not isinstance(rows, list) or not rows or is_turns(rows):
            return False
        return all(isinstance(row, dict) for row in rows) or (
            name.lower() in WRAPPERS and all(is_turns(row) and isinstance(row, list) for row in rows))

    lists = [name for name, rows in value.items() if holds(name, rows)]
    # a row may have a list of objects beside its texts: only a usual name, or nothing beside it, says that it holds rows
    lists = [name for name in lists if name.lower() in WRAPPERS or len(lists) == len(value)]
    if len(lists) > 1:
        raise ValueError(f"holds several lists of rows: {', '.join(lists)}; put the one meant into a file of its own")
    # pandas' orient="split" has "data", too, but as lists beside their columns' names
    return value[lists[0]] if lists else None


def columns_of(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of columns as pandas writes them: {name: {"0": ..}}, {name: [..]}, or {"columns", "index", "data"}.

    Raises:
        ValueError: columns of different length.
    """
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"} and isinstance(value["data"], list):
        if any(not isinstance(row, list) or len(row) != len(value["columns"]) for row in value["data"]):
            raise ValueError("its rows have other numbers of fields than it has columns")
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    columns = list(value.values())
    by_index = all(isinstance(c, dict) and c and all(key.isdigit() for key in c) for c in columns)
    as_lists = len(columns) > 1 and all(isinstance(c, list) and not is_turns(c) for c in columns)
    if not columns or not (by_index or as_lists):
        return None
    if by_index:
        if len({tuple(column) for column in columns}) > 1:
            raise ValueError("its columns do not have the same row numbers; write it with orient='records'")
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"its columns have different lengths ({', '.join(f'{n} {len(c)}' for n, c in value.items())})")
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
