"""Tables and looked-up numbers of the docs are those of docs/data; the data are small, and each file is used."""

from __future__ import annotations

import json
import re

from config import ROOT
from scripts import study_tables

DATA = ROOT / "docs" / "data"
BLOCKS = {path.relative_to(ROOT).as_posix(): re.findall(r"<!-- made from (\w+): (\w+)", path.read_text(encoding="utf-8"))
          for path in study_tables.pages()}


def test_pages_are_made_from_the_data(capsys):
    study_tables.main(["--check"])
    assert capsys.readouterr().out == "all tables are those of docs/data\n"


def test_the_front_page_and_the_studies_have_tables_of_models():
    for page in ("README.md", "docs/studies/leaderboard.md", "docs/studies/h3fusion.md", "docs/studies/quickstart.md",
                 "docs/validation_trials.md"):
        assert any(kind == "models" for _, kind in BLOCKS[page]), page


def test_a_table_of_models_is_typed_nowhere():
    """A table with intervals that stands in no block was typed, and would stay when the data change."""
    typed = {}
    for page in (*BLOCKS, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "studies").glob("*.md"))):
        text = re.sub(r"<!-- made from .*?<!-- end -->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
        typed[page] = len(re.findall(r"^\| model \|(?!.*(?:memory|seconds)).*\n", text, re.M))
    assert {page for page, n in typed.items() if n} <= TYPED


#: Pages of studies with runs older than docs/data, with tables that their own commands printed.
TYPED = {"docs/studies/lora_fusion.md"}


def test_the_leaderboards_page_has_the_datas_cells():
    report = json.loads((DATA / "leaderboard.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    head = "| model | " + " | ".join(column["title"] for column in report["columns"]) + " |\n"
    table = text.split(head)[1].split("\n\n")[0]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert len(report["rows"]) >= 30
    for row in report["rows"]:
        assert row["seeds"] == ["seed 42", "seed 43", "seed 44"]
        for cell in row["cells"].values():
            assert f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in lines[row["label"]]


def test_the_data_are_small_and_each_is_used():
    files = sorted(DATA.glob("*.json"))
    used = {file for blocks in BLOCKS.values() for file, _ in blocks}
    used |= set(re.findall(r"\{\w+@(\w+)\|", (DATA / "sentences.yaml").read_text(encoding="utf-8")))
    assert {file.stem for file in files} == used
    assert sum(file.stat().st_size for file in files) < 2_000_000
