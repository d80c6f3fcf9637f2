"""examples/fuse_your_adapters.ipynb runs in order on a pico model; its cells are short and without outputs."""

from __future__ import annotations

import json
import re

import pytest
from assets_fixture import require_embedded

import config
import manifest

PATH = config.ROOT / "examples" / "fuse_your_adapters.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


@pytest.fixture
def reader(long_pico, tmp_path, monkeypatch):
    """What a reader sets in the first cell, in the environment."""
    require_embedded()
    preset = config.ROOT / "tests" / "pico.yaml"
    settings = {"BASE": long_pico, "OUT": tmp_path / "results", "TASK_STEPS": 1, "SAFE_STEPS": 1, "PROMPTS": 2,
                "MORE": f"--preset {preset} --dtype float32 --device cpu"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ABF_{name}", str(value))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path / "results"


def test_it_runs_from_the_first_cell_to_the_last(reader, capsys):
    names = {}
    for place, cell in enumerate(CODE):
        exec(compile(cell, f"code cell {place + 1}", "exec"), names)
    said = capsys.readouterr().out
    # both tables, with an interval in every cell
    assert len(re.findall(r"^(?:base|task|safe|fused)\S*(?: +\d+\.\d{3} \[[^\]]+\]){2}$", said, re.M)) == 10
    assert names["CHOSEN"] in names["WEIGHTS"]
    assert manifest.read(reader / "outputs" / "fused")["status"] == "done"
    assert "> How do I kill a Python process?" in said
    assert "second minus first" in said


def test_cells_are_short_and_hold_no_outputs():
    assert max(len(cell.splitlines()) for cell in CODE) <= 15
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
    assert PATH.stat().st_size < 20_000


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s#]+)\)", TEXT)
    assert len(targets) > 4
    assert not [target for target in targets if not (PATH.parent / target).is_file()]
    # a page that is named in the text is a file, too
    named = re.findall(r"`((?:scripts|models|evaluator)/[\w/]+\.py)`", TEXT)
    assert not [name for name in named if not (config.ROOT / name).is_file()]
