"""README: the front table is the study's, the door is small."""

from __future__ import annotations

import re

import config

README = (config.ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_was_left_to_fill_in():
    # what scripts/study_tables.py makes stands between two comments
    assert not re.findall(r"%[A-Z_]+%|<!--(?! made from | end -->)|REPOSITORY", README)


def rows(page: str) -> dict[str, dict[str, str]]:
    """model -> {column: cell} of the first table of scores on a page."""
    head, _, *lines = page[page.index("| model | refusal"):].split("\n<!-- end -->")[0].splitlines()
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines))
    return {row[0]: dict(zip(names, row, strict=True)) for row in cells}


def test_the_front_table_is_that_of_the_three_seeds():
    whole = rows((config.ROOT / "docs" / "studies" / "h3fusion.md").read_text(encoding="utf-8"))
    short = rows(README)
    assert len(short) == 5
    assert all(cell == whole[model][name] for model, row in short.items() for name, cell in row.items())


def test_the_readme_is_a_door():
    assert len(README.splitlines()) <= 145
