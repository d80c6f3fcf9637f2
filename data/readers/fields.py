"""Fields of the published shapes: which a shape has, what each must be, and what is meant by what pandas makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data.readers.columns import HISTORY, SYSTEM, refused
from data.readers.dialog_files import system_of
from data.readers.row_files import Problems, Row
from data.readers.turns import empty, history_of


@dataclass(frozen=True)
class Shape:
    """A kind of row: the fields that give it away, and each field's kind (see ``CHECKS``)."""

    name: str
    mark: frozenset[str]
    fields: dict[str, str]

    def describe(self) -> str:
        """The shape in a user's words."""
        return f"{self.name} {{{', '.join(self.fields)}}}"


def _text(value: Any) -> str | None:
    return _not_nan(value) if isinstance(value, str) and value.strip() else "needs text that is not blank"


def _answer(value: Any) -> str | None:
    if isinstance(value, float) and not empty(value):
        return f"needs text: {value} can be written in several ways"
    return _not_nan(value) if isinstance(value, str) or _is_whole(value) else "needs text"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _not_nan(value: Any) -> str | None:
    return "holds 'nan', which is how pandas writes a missing text: leave it empty" if value == "nan" else None


def _optional(value: Any) -> str | None:
    return _not_nan(value) if isinstance(value, str) or empty(value) else "needs text or nothing"


#: Yes and no as JSON, and as pandas saves them.
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _flag(value: Any) -> str | None:
    return None if str(value).lower() in _FLAGS else "needs true or false"


def _texts(value: Any) -> str | None:
    ok = isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))
    return None if ok and value else "needs a list of texts (in a CSV: separated by ';')"


def _side(value: Any) -> str | None:
    return None if str(value) in ("0", "1") else "needs 0 or 1"


def _two(value: Any) -> str | None:
    ok = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, str) for v in value)
    return None if ok else "needs two texts: [chosen, rejected]"


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "text": _text, "answer": _answer, "optional": _optional, "flag": _flag, "texts": _texts, "side": _side, "two": _two,
    "any": lambda value: None}


def checked(rows: Iterable[Row], shape: Shape, split: str, problems: Problems) -> list[Row]:
    """The rows whose fields are all of their kind, as they are meant; each other field is a problem."""
    good = []
    for row in rows:
        before = len(problems.found)
        for name, kind in shape.fields.items():
            if kind in ("optional", "any") and name not in row.fields or kind == "flag" and split != "train":
                continue
            if name not in row.fields:
                problems.add(f"{row.where}: field '{name}' is missing; needed: {shape.describe()}")
            elif (wrong := CHECKS[kind](row.fields[name])) is not None:
                problems.add(f"{row.where}: field '{name}' is a {type(row.fields[name]).__name__} and {wrong}")
        try:
            system_of(row.fields), history_of(next((row.fields[name] for name in HISTORY if name in row.fields), None))
        except ValueError as error:
            problems.add(f"{row.where}: {error}")
        for sentence in refused(row.fields, {*shape.fields, *SYSTEM, *HISTORY}, split):
            problems.add(f"{row.where}: {sentence}")
        if len(problems.found) == before:
            good.append(_as_meant(row, shape, split))
    return good


def _as_meant(row: Row, shape: Shape, split: str) -> Row:
    """The row with booleans out of their texts, whole numbers as texts, and None where pandas writes NaN."""
    fields = dict(row.fields)
    for name, kind in shape.fields.items():
        if kind == "flag" and split == "train":
            # a CSV writes its booleans as text, and bool("False") is true
            fields[name] = _FLAGS[str(fields[name]).lower()]
        elif kind == "answer" and _is_whole(fields[name]):
            fields[name] = str(fields[name])
        elif kind == "optional" and empty(fields.get(name)) and not isinstance(fields.get(name), str):
            fields[name] = None
    return Row(fields, row.where)
