"""Prompt files in the shapes that benchmarks come in: tables, nested JSON, JSON lists of texts, folders of bare CSV.

Each becomes rows {prompt, category, subcategory, ...} with the place they stand in; every problem is raised together.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.readers.delimited import column_name, heads_a_table
from data.readers.dialog_files import HEADS
from data.readers.json_objects import DECODER
from data.readers.row_files import Problems, Row, read_rows, read_text
from errors import UserError

_CATEGORY_FILE = re.compile(r"category_(\d+)\.csv")


def read_questions(place: Path, categories: Sequence[str] = ()) -> list[Row]:
    """The rows of a prompt file or folder, whatever its shape.

    Args:
        place: a .json, .jsonl or .csv file, or a folder of header-less category_N.csv files (HEx-PHI).
        categories: names of the categories of such a folder, N = 1 first.

    Raises:
        UserError: with every problem.
    """
    problems = Problems()
    if place.is_dir():
        rows = _folder_rows(place, categories, problems)
    else:
        value = _whole_json(place)
        rows = read_rows(place, problems) if value is None else list(_walk(value, str(place), (), problems))
    problems.raise_if_any()
    if not rows:
        raise UserError(f"{place}: holds no prompt")
    return rows


def _whole_json(file: Path) -> Any:
    """The content of a .json file that holds {category: ...} or a list of texts; None for tables (read line by line)."""
    text = read_text(file)
    if file.suffix.lower() != ".json":
        return None
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None  # one object a line, or damaged: the row reader names the line
    if isinstance(value, list):
        # a list of objects is a table, whose rows are read one by one, with their lines
        return value if value and all(isinstance(item, str) for item in value) else None
    nested = isinstance(value, dict) and value and all(isinstance(item, (dict, list)) for item in value.values())
    return value if nested else None


def _walk(value: Any, where: str, groups: tuple[str, ...], problems: Problems) -> Iterator[Row]:
    # category and subcategory, as CATQA nests them; what goes deeper is no set of prompts
    if isinstance(value, dict) and len(groups) < 2:
        for name, inner in value.items():
            yield from _walk(inner, where, (*groups, name), problems)
    elif isinstance(value, list):
        place = f"{where}: " + "".join(f"{group} / " for group in groups)
        for number, prompt in enumerate(value, 1):
            if isinstance(prompt, str):
                yield Row({"prompt": prompt, **dict(zip(("category", "subcategory"), groups, strict=False))},
                          f"{place}prompt {number}")
            else:
                problems.add(f"{place}prompt {number}: needs text, this is a {type(prompt).__name__}")
    else:
        problems.add(f"{where}: {' / '.join(groups)}: needs a list of prompts, this is a {type(value).__name__}")


def _folder_rows(folder: Path, categories: Sequence[str], problems: Problems) -> list[Row]:
    files = {int(match[1]): file for file in folder.iterdir() if (match := _CATEGORY_FILE.fullmatch(file.name))}
    if not files:
        raise UserError(f"{folder}: a folder of prompts needs files named category_1.csv, category_2.csv, ...")
    # by number: as text category_10 comes before category_2
    return [row for number, file in sorted(files.items())
            for row in _bare_rows(file, _category_name(number, categories), problems)]


def _category_name(number: int, categories: Sequence[str]) -> str:
    return f"{number} {categories[number - 1]}" if 0 < number <= len(categories) else str(number)


def _bare_rows(file: Path, category: str, problems: Problems) -> Iterator[Row]:
    """One prompt a row; a first row that only says ``prompt`` is a header."""
    text = read_text(file)
    if heads_a_table(text, HEADS):
        problems.add(f"{file}:1: names several columns; a file of such a folder holds one prompt a row and nothing else")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for values in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
            if not any(value.strip() for value in values) or (
                    len(values) == 1 and where == f"{file}:1" and column_name(values[0]) in HEADS):
                continue
            if len(values) > 1:
                problems.add(f"{where}: {len(values)} fields where one prompt is expected; quote prompts that hold commas")
            else:
                yield Row({"prompt": values[0].strip(), "category": category}, where)
    except csv.Error as error:
        problems.add(f"{file}:{line}: not CSV ({error}); quote fields that hold quotes or line breaks")
