"""Tables of models in the docs are those of the reports in docs/data, cell by cell; README's is a part of one of them."""

from __future__ import annotations

import json
import re

import pytest

from config import ROOT
from evaluator.reporting.formats import interval, number
from scripts import study_tables

DATA = ROOT / "docs" / "data"
#: Page -> the report whose rows its first table of models has; further tables of the same report follow it.
PAGES = {"docs/studies/h3fusion.md": "h3fusion", "docs/studies/quickstart.md": "quickstart", "README.md": "h3fusion",
         "docs/validation_trials.md": "validation_trials"}


def test_pages_are_made_from_the_data(capsys):
    study_tables.main(["--check"])
    assert capsys.readouterr().out == "all tables are those of docs/data\n"


def read(name):
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def tables(page):
    """Every table of a page: its heads, and its rows as lists of cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        found.append((head, rows))
    return found


def titled(report, title):
    return next(column["name"] for column in report["columns"] if column["title"] == title)


def models(report, titles):
    """The table of models as a report writes it: label -> cells, those of rows without a model at the end."""
    names = [titled(report, title) for title in titles]
    rows = {row["label"]: [number(cell["value"]) + interval(*(float("nan") if cell[end] is None else cell[end]
                                                             for end in ("low", "high")))
                           if (cell := row["cells"].get(name)) else "" for name in names] for row in report["rows"]}
    without = {f"({name})": [number(values[column]) for column in names] for name, values in report["without_model"].items()}
    return rows | without


def per_seed(report, titles):
    """(label, seed) -> values."""
    names = [titled(report, title) for title in titles]
    return {(row["label"], seed): [number(row["cells"][name]["per_seed"][at]) if name in row["cells"] else ""
                                   for name in names] for row in report["rows"] for at, seed in enumerate(row["seeds"])}


def differences(report, titles):
    """The other row's label -> differences with their verdicts."""
    names = [titled(report, title) for title in titles]
    found = {(item["against"], item["column"]): item for item in report["differences"]}
    return {label: [f"{number(d['value'], True)}{interval(d['low'], d['high'])} {d['verdict']}"
                    if (d := found.get((label, name))) else "" for name in names]
            for label in dict.fromkeys(other for other, _ in found)}


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_models_is_the_reports(page):
    report = read(PAGES[page])
    head, rows = next((head, rows) for head, rows in tables(page) if head[0] == "model" and head[1].startswith("refusal"))
    wanted = models(report, head[1:])
    assert {row[0] for row in rows} <= set(wanted)
    assert len(rows) >= 5
    wrong = {(row[0], title): (cell, there) for row in rows
             for title, cell, there in zip(head[1:], row[1:], wanted[row[0]], strict=True) if cell != there}
    assert not wrong
    # README shows some of the rows, the pages behind it all
    assert page == "README.md" or [row[0] for row in rows] == list(wanted)


@pytest.mark.parametrize(("page", "first", "made"), [
    ("docs/studies/h3fusion.md", ["model", "seed"], per_seed), ("docs/studies/h3fusion.md", ["against"], differences)])
def test_further_tables_are_the_reports(page, first, made):
    head, rows = next((head, rows) for head, rows in tables(page) if head[: len(first)] == first)
    wanted = made(read(PAGES[page]), head[len(first):])
    key = (lambda row: (row[0], row[1])) if len(first) == 2 else (lambda row: row[0])
    assert {key(row): row[len(first):] for row in rows} == wanted


@pytest.mark.parametrize(("page", "least"), [("docs/studies/h3fusion.md", 13), ("docs/studies/quickstart.md", 7)])
def test_findings_are_the_reports(page, least):
    """A page may leave findings out; those that it has stand there word for word."""
    report = read(PAGES[page])
    begins = (*(f"- {column['title']} (" for column in report["columns"]), "- In sum, of ", "- Corrected by Holm over these",
              "- Compared with ")
    found = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith(begins)]
    assert len(found) >= least
    assert [line for line in found if line not in report["findings"]["sentences"]] == []


def test_the_data_are_small_and_each_is_used():
    files = sorted(DATA.glob("*.json"))
    assert {file.stem for file in files} == set(PAGES.values())
    assert sum(file.stat().st_size for file in files) < 2_000_000
