"""Tables as text: which mark separates the fields, in which encoding the file stands, its rows with their lines.

Excel writes semicolons where a comma marks decimals, tabs and UTF-16 as "Unicode Text", and a first line ``sep=;``. All of
these are told by the header or by the byte order mark, so none is guessed; an encoding without a mark is.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from _csv import Reader

log = logging.getLogger(__name__)
#: What separates fields beside the comma, and what it is called.
MARKS = {";": "semicolons", "\t": "tabs"}
_DECLARED = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)
_BYTE_ORDER = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
               (codecs.BOM_UTF16_BE, "utf-16"))


def decoded(data: bytes, file: Path) -> str:
    """The text of a file: UTF-8, with or without the mark that spreadsheets put in front, or what a byte order mark says.

    Raises:
        UserError: it is neither.
    """
    kind = next((kind for mark, kind in _BYTE_ORDER if data.startswith(mark)), "utf-8-sig")
    try:
        # tools that each put a mark in front leave two
        return data.decode(kind).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        said = "UTF-8" if kind == "utf-8-sig" else f"the {kind.upper()} that its first bytes announce"
        raise UserError(f"{file}:{line}: not {said} (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None


def column_name(name: str) -> str:
    """A header's name as columns are looked up: headers come with spaces, capitals, underscores as their authors liked."""
    return name.strip().lower().replace(" ", "_")


def opened(text: str, file: Path) -> tuple[Reader, int]:
    """A strict reader of a table's records, the header first, and the number of lines before the header.

    Raises:
        UserError: the header could be separated by semicolons and by tabs.
    """
    declared = _DECLARED.match(text)
    body = text[declared.end():] if declared else text
    mark = declared[1] if declared else "\t" if ".tsv" in file.name.lower() else _mark(body, file)
    if mark in MARKS:
        log.info("%s: its fields are separated by %s", file, MARKS[mark])
    # strict: quotes in wrong places raise, where the default would guess
    return csv.reader(io.StringIO(body, newline=""), delimiter=mark, strict=True), int(bool(declared))


def _mark(text: str, file: Path) -> str:
    names = _first(text, ",")
    # one column whose name holds a mark: saved by a program that writes semicolons or tabs
    found = [mark for mark in MARKS if len(names) == 1 and mark in names[0]]
    if len(found) > 1:
        raise UserError(f"{file}:1: the header is one column, {names[0]!r}, with semicolons and tabs in it; save the table "
                        "with commas")
    return found[0] if found else ","


def _first(text: str, mark: str) -> list[str]:
    """The fields of a table's first line; none where its quotes are wrong, which its reader says better."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        return next((values for values in reader if values), [])
    except csv.Error:
        return []


def heads_a_table(text: str, heads: Container[str]) -> bool:
    """Whether the first line of what looks like one column of texts names several columns, with another mark between."""
    if _DECLARED.match(text):
        return True
    fields = [[column_name(name) for name in _first(text, mark)] for mark in MARKS]
    return any(len(names) > 1 and any(name in heads for name in names) for names in fields)


def table_rows(text: str, file: Path) -> Iterator[tuple[dict[str, str] | str, str]]:
    """(fields or what is wrong with the row, ``file:line``) of each row; rows without a single text are none.

    Raises:
        UserError: a header that names a column twice.
    """
    reader, before = opened(text, file)
    names: Sequence[str] | None = None
    line, blank = before, 0
    try:
        for values in reader:
            where, line = f"{file}:{line + 1}", before + reader.line_num
            if not values:
                continue
            if names is None:
                names = [column_name(name) for name in values]
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise UserError(f"{where}: the header names a column twice: {', '.join(twice)}; rename or drop one of "
                                    "the two")
            elif len(values) != len(names):
                more = "more" if len(values) > len(names) else "fewer"
                yield f"{more} fields than the header has ({len(names)})", where
            elif not any(value.strip() for value in values):
                blank += 1
            else:
                yield dict(zip(names, values, strict=True)), where
    except csv.Error as error:
        yield f"not CSV ({error}); quote fields that hold quotes or line breaks", f"{file}:{line + 1}"
    if blank:
        # what a spreadsheet leaves below its table
        log.info("%s: %d rows of empty cells left out", file, blank)
