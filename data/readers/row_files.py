"""Rows of a JSON, JSONL, CSV or Parquet file, each with its line, read as if somebody hostile had written the file.

Every problem is one sentence with ``file:line``; up to ten are collected and raised together. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.readers.delimited import column_name, decoded, heads_a_table, table_rows
from data.readers.json_objects import DECODER, Damaged, columns_of, rows_within, spread_objects
from data.readers.turns import TURNS, is_turns, turns_in_texts
from errors import UserError, nearest_place

MAX_ROW = 1_000_000  # characters; a longer line is no prompt but a damaged file
#: One damaged line often damages all that follow: ten show what is wrong.
MAX_PROBLEMS = 10
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".ndjson", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
#: What a compressed file may hold: more is a bomb, or no file of prompts.
MAX_UNPACKED = 4 << 30


@dataclass(frozen=True)
class Row:
    """One row: its fields and where it stands (``file:line``)."""

    fields: dict[str, Any]
    where: str


@dataclass
class Problems:
    """Collects sentences and raises them together."""

    found: list[str] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        """Note a problem; the tenth ends the reading.

        Raises:
            UserError: with all ten.
        """
        self.found.append(sentence)
        if len(self.found) >= MAX_PROBLEMS:
            raise UserError(*self.found, f"(stopped after {MAX_PROBLEMS} problems)")

    def raise_if_any(self) -> None:
        """A UserError with every problem found, if there is one."""
        if self.found:
            raise UserError(*self.found)


def read_rows(file: Path, problems: Problems, *, turns: bool = False, bare: Container[str] = ()) -> list[Row]:
    """All rows of a file; a .json file may hold a list, one object a line, one object over several lines after the other,
    an object of rows ({"data": [..]}) or of columns, as pandas writes it.

    Args:
        turns: a row may be any list, the turns of a dialog: it becomes {messages: list}, as real turns always do.
        bare: names that head a single column of texts; with them, a CSV of one column whose first line is no such name has
            no header, and its rows become {prompt: text}.

    Raises:
        UserError: missing, a folder, another suffix, not UTF-8, empty.
    """
    if file.suffix.lower() == ".parquet" and file.is_file():
        return [_with_turns(row, problems) for row in _parquet_rows(file, problems)]
    text = read_text(file)
    if file.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        one = bare and _is_one_column(text) and not heads_a_table(text, bare)
        stream = _bare_rows(text, file, problems, bare) if one else _csv_rows(text, file, problems)
    elif text.lstrip().startswith("["):
        stream = _list_rows(text, file, problems, turns)
    elif (objects := _objects(text, file)) is not None:
        stream = _object_rows(objects, file, problems, turns)
    else:
        stream = _line_rows(text, file, problems, turns)
    rows = list(stream)
    if not rows:
        problems.raise_if_any()
        raise UserError(f"{file}: the file has no rows; it needs at least one")
    return [_with_turns(row, problems) for row in rows]


def _with_turns(row: Row, problems: Problems) -> Row:
    """The row with lists of turns where its columns of turns hold them as text, as tables do."""
    try:
        return Row(turns_in_texts(row.fields), row.where)
    except ValueError as error:
        problems.add(f"{row.where}: {error}")
        return row


def read_text(file: Path) -> str:
    """The text of such a file.

    Raises:
        UserError: missing, a folder, another suffix, not UTF-8, empty.
    """
    if not file.is_file():
        what = (_folder(file) if file.is_dir() else
                f"no such file{nearest_place(file)}; give a .json, .jsonl, .csv or .parquet file")
        raise UserError(f"{file}: {what}")
    if file.suffix.lower() == ".parquet":
        raise UserError(f"{file}: Parquet is read where rows are trained on or answers are scored, not here; save "
                        "it as .jsonl (pandas: to_json(.., orient='records', lines=True))")
    if not file.name.lower().endswith(SUFFIXES):
        raise UserError(f"{file}: unknown type '{file.suffix}'; allowed: {', '.join(SUFFIXES)}")
    text = _decode(file)
    if not text.strip():
        raise UserError(f"{file}: the file is empty; it needs at least one row")
    return text


def _folder(folder: Path) -> str:
    """What is said of a folder in a file's place: what it is, or the files that may have been meant."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return ("a folder of datasets' save_to_disk, whose Arrow files are not read; write it once more as one file: "
                "datasets.load_from_disk(FOLDER).to_parquet('rows.parquet'), of several splits each by itself")
    inside = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
    return f"is a folder; give a .json, .jsonl, .csv or .parquet file{', e.g. ' if inside else ''}{', '.join(inside[:4])}"


def _decode(file: Path) -> str:
    try:
        data = file.read_bytes() if file.suffix.lower() != ".gz" else _unpacked(file)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file ({error}); fetch or pack it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    return decoded(data, file)


def _unpacked(file: Path) -> bytes:
    with gzip.open(file) as stream:
        data = stream.read(MAX_UNPACKED + 1)
    if len(data) > MAX_UNPACKED:
        raise UserError(f"{file}: more than {MAX_UNPACKED >> 30} GiB when unpacked; give it in parts")
    return data


def _parquet_rows(file: Path, problems: Problems) -> list[Row]:
    """Rows of a Parquet file, counted from 1; columns of bytes, e.g. pictures, are left as they are and no text."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names, values = table.schema_arrow.names, [row for batch in table.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a Parquet file ({(str(error).splitlines() or [''])[0][:200]})") from None
    if len(set(names)) < len(names):
        raise UserError(f"{file}: names a column twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    if not values:
        raise UserError(f"{file}: the file has no rows; it needs at least one")
    return [Row(row, where) for number, row in enumerate(values, 1) for where in (f"{file}:{number}",)
            if not any(_too_long(v, where, problems) for v in row.values() if isinstance(v, str))]


def _objects(text: str, file: Path) -> list[tuple[Any, int, int]] | None:
    try:
        return spread_objects(text)
    except Damaged as error:
        raise UserError(f"{file}:{error.line}: not JSON ({_reason(error.reason)}); objects over several lines must follow "
                        "each other with nothing between them") from None


def _object_rows(objects: list[tuple[Any, int, int]], file: Path, problems: Problems, turns: bool) -> Iterator[Row]:
    """Rows of JSON objects (value, line, characters): rows themselves, or one that holds all rows or all columns."""
    if len(objects) == 1:
        value, line, _ = objects[0]
        try:
            inner = rows_within(value)
            inner = columns_of(value) if inner is None else inner
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
        if inner is not None:
            for number, row in enumerate(inner, 1):
                where = f"{file}:{number}"
                if not _too_long(json.dumps(row), where, problems):
                    yield from _checked(row, where, problems, turns)
            return
    for value, line, size in objects:
        if not _too_long(" " * min(size, MAX_ROW + 1), f"{file}:{line}", problems):
            yield from _checked(value, f"{file}:{line}", problems, turns)


def _line_rows(text: str, file: Path, problems: Problems, turns: bool) -> Iterator[Row]:
    # split on newlines only: U+2028 and its like are ordinary characters inside a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{file}:{number}"
        if not line.strip() or _too_long(line, where, problems):
            continue
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{where}: not JSON ({_reason(error)}); each line must be one object")
            continue
        yield from _checked(value, where, problems, turns)


def _list_rows(text: str, file: Path, problems: Problems, turns: bool) -> Iterator[Row]:
    """Elements of a JSON list one by one, so that each has its line; a syntax error ends the list."""
    # not json.loads: a list read whole has no lines, and a problem could not be found in the file
    decoder = DECODER
    # line breaks are counted from where the last count ended: from the start each time would be quadratic
    at, line, counted = text.index("[") + 1, 1, 0
    expected = False  # a value must follow (after a comma)
    number, last = 0, 0
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        number += 1
        # json.dump writes all rows into one line
        where, last = f"{file}:{line}" + (f" (row {number})" if line == last else ""), line
        if at < len(text) and text[at] == "]" and not expected:
            if text[at + 1 :].strip():
                problems.add(f"{where}: something follows the end of the list")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            problems.add(f"{where}: not JSON ({_reason(error)}); the file must be one list of objects")
            return
        if not _too_long(text[at:end], where, problems):
            yield from _checked(value, where, problems, turns)
        at = _skip_space(text, end)
        expected = at < len(text) and text[at] == ","
        if expected:
            at += 1
        elif at >= len(text) or text[at] != "]":
            here = line + text.count("\n", counted, at)
            problems.add(f"{file}:{here}: the list has no comma or closing bracket here")
            return


def _csv_rows(text: str, file: Path, problems: Problems) -> Iterator[Row]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if _too_long(line, f"{file}:{number}", problems):
            problems.raise_if_any()
    # the default limit of 131,072 characters is far below ours and set for the whole process: raise it, never lower
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))
    for fields, where in table_rows(text, file):
        if isinstance(fields, str):
            problems.add(f"{where}: {fields}")
        else:
            yield Row(fields, where)


def _is_one_column(text: str) -> bool:
    """Whether no line of a CSV has a second field, and its only column holds no dialogs."""
    try:
        records = [values for values in csv.reader(io.StringIO(text, newline=""), strict=True) if values]
    except csv.Error:
        return False  # the reader of tables says what is wrong with it
    return all(len(values) == 1 for values in records) and column_name(records[0][0]) not in TURNS


def _bare_rows(text: str, file: Path, problems: Problems, heads: Container[str]) -> Iterator[Row]:
    """Texts of a single column; the first line is a header where it is one of ``heads``, blank lines are no rows."""
    line, reader = 1, csv.reader(io.StringIO(text, newline=""), strict=True)
    for number, values in enumerate(reader):
        where, line = f"{file}:{line}", reader.line_num + 1
        if not values or not values[0].strip() or (number == 0 and column_name(values[0]) in heads):
            continue
        if not _too_long(values[0], where, problems):
            yield Row({"prompt": values[0].strip()}, where)


def _checked(value: Any, where: str, problems: Problems, turns: bool) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, where)
    elif isinstance(value, list) and (turns or is_turns(value)):
        yield Row({"messages": value}, where)
    else:
        problems.add(f"{where}: a row must be an object with named fields, this is a {type(value).__name__}")


def _too_long(text: str, where: str, problems: Problems) -> bool:
    if len(text) > MAX_ROW:
        problems.add(f"{where}: a row of {len(text)} characters; at most {MAX_ROW} are read")
        return True
    return False


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply" if isinstance(
        error, RecursionError) else str(error)
