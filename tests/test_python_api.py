"""docs/reference/python.md run as a reader runs it, block by block; the packages that an install brings."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from assets_fixture import require_embedded
from pico import make_adapter
from setuptools import find_packages
from test_architecture import CODE

import config

PAGE = (config.ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
#: What pyproject.toml installs beside the modules of the root.
FOUND = tomllib.loads((config.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.fixture(scope="module")
def read(tmp_path_factory, pico):
    """The names that a reader has after the last block."""
    require_embedded()
    folder = tmp_path_factory.mktemp("python")
    shutil.copytree(pico, folder / "base")
    # a byte is a token of a pico model: the embedded prompts are longer than its positions
    settings = folder / "base" / "config.json"
    settings.write_text(settings.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 32768'))
    for seed, name in enumerate(("task", "safe")):
        make_adapter(folder / "base", folder / "results" / "outputs" / name, seed=seed)
    names = {"BASE": str(folder / "base"), "OUT": str(folder / "results")}
    for place, block in enumerate(BLOCKS):
        exec(compile(block, f"block {place + 1} of python.md", "exec"), names)
    return names


def test_every_section_has_a_block():
    assert len(BLOCKS) == len(re.findall("^## ", PAGE, re.M)) == 9


def test_tensors_are_merged(read):
    # half of each vector stays; the signs that win are elected, and what agrees with them is averaged
    assert read["merged"]["weight"].tolist() == [3.0, 2.0, -3.0, 0.0]
    assert read["average"].tolist() == pytest.approx([2.0, 0.5, -2.0, 0.15])
    assert not read["base"]["weight"].any()


def test_runs_are_there(read):
    made = {path.name for path in Path(read["OUT"], "outputs").iterdir()}
    assert {"both", "fused", "moe"} <= made
    assert read["a"].shape[0] == read["b"].shape[1] == 8


def test_answers_and_likelihoods(read):
    assert read["answer"].finish in ("stop", "length")
    assert read["logprob"] < 0 < read["tokens"]
    assert read["table"].shape == (2, len(read["openers"]))
    assert (read["refusal"] < 0).all()


def test_statistics(read):
    assert read["score"].value == pytest.approx(15 / 16)
    assert read["score"].low < read["score"].value <= read["score"].high
    assert len(read["corrected"]) == 3
    assert all(p >= d.p for p, d in zip(read["corrected"], read["differences"], strict=True))
    assert read["masks"]["layer.weight"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert 0 <= read["measured"](Path(read["OUT"]), "safe").scores["refusal_auc"]["value"] <= 1


def test_what_the_page_names_can_be_imported(read):
    rows = re.findall(r"`([a-zA-Z_]+)` from `([\w.]+)`", PAGE)
    assert len(rows) >= 9
    missing = [(name, module) for name, module in rows
               if not hasattr(__import__(module, fromlist=[name]), name)]
    assert not missing


def test_an_install_brings_every_package_and_module():
    installed = set(find_packages(str(config.ROOT), include=FOUND["packages"]["find"]["include"]))
    wings = {"flags", "data", "models", "training", "evaluator"}
    assert installed == {".".join(path.parent.parts) for path in CODE if path.parts[0] in wings}
    assert set(FOUND["py-modules"]) == {path.stem for path in CODE if len(path.parts) == 1}
