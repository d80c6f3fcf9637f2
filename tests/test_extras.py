"""The extras of pyproject.toml: pinned as requirements.txt pins them."""

from __future__ import annotations

import re

import pytest

from config import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings this one along there
    import tomli as tomllib

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
#: Extras that the scripts do not install: the site, notebooks and trackers.
APART = ("docs", "notebook", "tensorboard", "wandb")


def pins(lines):
    """Package -> version of requirement lines; markers left out."""
    return dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line.partition(";")[0].strip()).groups() for line in lines
                if "==" in line and not line.startswith("#"))


REQUIRED = pins((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name not in APART])
def test_an_extra_has_the_pins_of_the_requirements(extra):
    assert pins(EXTRAS[extra]).items() <= REQUIRED.items()


@pytest.mark.parametrize("extra", APART)
def test_an_extra_apart_is_pinned_and_not_installed_by_the_scripts(extra):
    found = pins(EXTRAS[extra])
    assert len(found) == len(EXTRAS[extra])
    assert not found.keys() & REQUIRED.keys()


def test_the_linter_of_a_commit_is_that_of_the_tests():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"ruff=={REQUIRED['ruff']}" in text
