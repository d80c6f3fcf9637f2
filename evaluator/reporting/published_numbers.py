"""Numbers that papers and their authors published, as data: ``data/published_numbers/*.yaml``, ready for tables.

Every number has a provenance; a cell that its source got wrong, or that nobody could check, bears a mark. A cell without a
number was not reported: it stays empty.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from config import ROOT
from errors import UserError

FOLDER = ROOT / "data" / "published_numbers"
#: What a mark says of a cell; the file explains why.
MARKS = ("invalid", "suspicious", "unverified")
_TABLE = {"title": str, "section": str, "unit": str, "higher_is_better": bool, "provenance": str, "keys": list,
          "columns": list, "rows": list}


@dataclass(frozen=True)
class Cell:
    """A published value, None where none was reported, and its mark ("": none)."""

    value: float | None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A published table.

    Args:
        name: in its file.
        section: of the specification that it was taken from.
        provenance: a key of the file's list of sources.
        keys: names of the parts of a row's key.
        rows: key -> column -> cell.
        note: what to say beside it.
    """

    name: str
    title: str
    section: str
    unit: str
    higher_is_better: bool
    provenance: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: dict[tuple[str, ...], dict[str, Cell]]
    note: str = ""

    def cell(self, *key: str, column: str) -> Cell:
        """A cell by its row's key and its column; a KeyError where there is none."""
        return self.rows[key][column]


@dataclass(frozen=True)
class Published:
    """All tables of one paper, with what its sources and marks mean."""

    paper: str
    arxiv: str
    provenance: dict[str, str]
    marks: dict[str, str]
    tables: dict[str, Table]


def papers() -> tuple[str, ...]:
    """The names that ``published`` knows."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def published(name: str, folder: Path = FOLDER) -> Published:
    """The numbers of a paper, every table checked.

    Raises:
        UserError: no such file, or everything that is wrong with it.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"
        raise UserError(f"{path}: no such numbers; known: {known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    problems: list[str] = []
    head = {"paper": str, "arxiv": str, "provenance": dict, "marks": dict, "tables": dict}
    # the head first: tables are checked against the provenances and marks that it explains
    if not isinstance(content, dict) or _wrong(content, head, {}, str(path), problems):
        raise UserError(*(problems or [f"{path}: must be a mapping of {', '.join(head)}"]))
    problems += [f"{path}: mark '{mark}' is not known; allowed: {', '.join(MARKS)}" for mark in content["marks"]
                 if mark not in MARKS]
    tables = {key: table for key, body in content["tables"].items()
              if (table := _table(str(key), body, content, f"{path}: {key}", problems))}
    if problems:
        raise UserError(*problems)
    return Published(content["paper"], content["arxiv"], content["provenance"], content["marks"], tables)


def _wrong(body: dict[str, Any], needed: dict[str, type], optional: dict[str, type], where: str,
           problems: list[str]) -> bool:
    """Whether a mapping lacks a key, has a strange one, or one of another type; each is a problem."""
    before = len(problems)
    problems += [f"{where}: '{key}' is missing" for key in needed if key not in body]
    problems += [f"{where}: unknown key '{key}'; allowed: {', '.join((*needed, *optional))}" for key in body
                 if key not in needed and key not in optional]
    problems += [f"{where}: '{key}' must be a {kind.__name__}, is a {type(body[key]).__name__}"
                 for key, kind in (needed | optional).items() if key in body and not isinstance(body[key], kind)]
    return len(problems) > before


def _table(name: str, body: Any, content: dict[str, Any], where: str, problems: list[str]) -> Table | None:
    if not isinstance(body, dict) or _wrong(body, _TABLE, {"note": str}, where, problems):
        problems += [] if isinstance(body, dict) else [f"{where}: must be a mapping"]
        return None
    if body["provenance"] not in content["provenance"]:
        problems.append(f"{where}: provenance '{body['provenance']}' is not explained under provenance")
    columns = tuple(map(str, body["columns"]))
    # a problem in one row must not hide those of the others
    rows: dict[tuple[str, ...], dict[str, Cell]] = {}
    for number, row in enumerate(body["rows"], 1):
        here = f"{where}, row {number}"
        if not isinstance(row, dict) or _wrong(row, {"key": list, "values": list}, {"marks": dict}, here, problems):
            problems += [] if isinstance(row, dict) else [f"{here}: must be a mapping"]
            continue
        key, values, marks = tuple(map(str, row["key"])), row["values"], row.get("marks", {})
        problems += _row_problems(key, values, marks, body, columns, content["marks"], here)
        if key in rows:
            problems.append(f"{here}: {' / '.join(key)} stands there twice")
        # uneven rows are problems by now; strict would raise before all of them are told
        rows[key] = {c: Cell(v, marks.get(c, "")) for c, v in zip(columns, values, strict=False)}
    return Table(name, body["title"], body["section"], body["unit"], body["higher_is_better"], body["provenance"],
                 tuple(map(str, body["keys"])), columns, rows, body.get("note", ""))


def _row_problems(key: tuple[str, ...], values: list[Any], marks: dict[str, Any], body: dict[str, Any],
                  columns: tuple[str, ...], known: dict[str, str], here: str) -> list[str]:
    problems = []
    if len(key) != len(body["keys"]):
        problems.append(f"{here}: a key of {len(key)} parts; needed: {', '.join(map(str, body['keys']))}")
    if len(values) != len(columns):
        problems.append(f"{here}: {len(values)} values for {len(columns)} columns")
    problems += [f"{here}: {value!r} is no number; write null for what was not reported" for value in values
                 # YAML reads yes and no as booleans, which Python counts as 1 and 0
                 if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value)]
    for column, mark in marks.items():
        if column not in columns:
            problems.append(f"{here}: mark on '{column}', which is no column")
        elif mark not in known:
            problems.append(f"{here}: mark '{mark}' is not explained under marks")
        elif values[columns.index(column)] is None:
            problems.append(f"{here}: mark on '{column}', which has no value")
    return problems


def markdown(paper: Published) -> list[str]:
    """A paper's tables as Markdown lines, each with its source; marked cells name their mark, empty: not reported."""
    lines = ["", f"## Published: {paper.paper} (arXiv {paper.arxiv})", "",
             "Other models, data and judges than the rows above: beside them, not in one ranking with them.",
             *(f"- [{mark}]: {why}." for mark, why in paper.marks.items())]
    for table in paper.tables.values():
        arrow = "↑" if table.higher_is_better else "↓"
        lines += ["", f"{table.title} ({table.unit} {arrow}; {paper.provenance[table.provenance]})"
                      + (f": {table.note}." if table.note else "."), ""]
        body = [[" / ".join(table.keys), *table.columns], ["---"] * (len(table.columns) + 1)]
        body += [[" / ".join(key), *(_shown(cells[column]) for column in table.columns)]
                 for key, cells in table.rows.items()]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in body]
    return lines


def as_data(paper: Published) -> dict[str, Any]:
    """A paper's tables as JSON values: of every row its key by the names of its parts, and its cells with their marks."""
    return {**asdict(paper), "tables": {name: {**asdict(table), "rows": [
        {"key": dict(zip(table.keys, key, strict=True)), "cells": {column: asdict(cell) for column, cell in cells.items()}}
        for key, cells in table.rows.items()]} for name, table in paper.tables.items()}}


def _shown(cell: Cell) -> str:
    return "" if cell.value is None else f"{cell.value:g}" + (f" [{cell.mark}]" if cell.mark else "")
