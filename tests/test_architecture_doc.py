"""docs/architecture.md is the tree's twin: its floors, its list of files, its paths. Every page's links lead somewhere."""

from __future__ import annotations

import re

import pytest
from test_architecture import CODE, LADDER, ROOT, sources

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))}
#: A file of ours that a text names with its folder. The lab log is history: it names files where they stood that day.
PATH = re.compile(r"(?<![\w./{}-])((?:benchmarks|data|docs|evaluator|examples|flags|models|scripts|tests|training)/"
                  r"[\w./-]*\.(?:py|sh|md|ya?ml|txt|png|ipynb))\b")


def block(heading: str) -> list[str]:
    """The lines of the first fenced block under a heading."""
    return PAGE.split(f"\n## {heading}\n")[1].split("```\n")[1].splitlines()


def index() -> list[tuple[str, str]]:
    """(file, what it does) of every line of the list of files."""
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in block("Every file") if line]


def anchor(heading: str) -> str:
    """How a forge names a heading in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_floors_are_the_ladder():
    assert [tuple(line.split()) for line in block("The floors")] == list(LADDER)


def test_every_file_is_listed_once_and_every_listed_file_exists():
    listed = [file for file, _ in index()]
    # what people read and change: code, and the tables and texts that lie beside it
    tables = {path for path in sources(".yaml")
              if path.parts[0] in ("data", "evaluator") and "published_numbers" not in path.parts}
    wanted = {path.as_posix() for path in {*CODE, *tables} if path.name != "__init__.py"}
    assert not sorted(wanted - set(listed)), "add a line for each to 'Every file' in docs/architecture.md"
    assert not [file for file in listed if not (ROOT / file).is_file()]
    assert len(set(listed)) == len(listed)


def test_every_line_says_what_the_file_does():
    assert not [file for file, words in index() if not words]
    assert max(map(len, block("Every file"))) <= 125


def test_there_are_seven_files_to_read_first():
    first = re.findall(r"^\d\. `([^`]+)`", PAGE.split("## Read these seven files first")[1].split("\n## ")[0], re.M)
    assert len(first) == 7
    assert all((ROOT / file).is_file() for file in first)


def test_every_table_that_is_named_stands_in_its_file():
    pages = [PAGE, *(text for page, text in PAGES.items() if page.startswith("docs/extend/"))]
    named = re.findall(r"`([A-Z_]{3,})`(?: or `[A-Z]+`)? of `([\w/.]+\.py)`", "\n".join(pages))
    assert len(named) > 5
    assert not [(table, file) for table, file in named
                if not re.search(rf"^{table}\b", (ROOT / file).read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/lab-log.md"])
def test_every_path_that_a_page_names_exists(page):
    # the targets of links start at the page; the test below follows them
    text = re.sub(r"\]\([^)\s]+\)", "]", PAGES[page])
    assert not [path for path in PATH.findall(text) if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        file, _, part = target.partition("#")
        if "://" in file:
            continue
        there = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M) if part and there.is_file() else []
        if not there.is_file() or (part and part not in map(anchor, headings)):
            dead.append(target)
    assert not dead
