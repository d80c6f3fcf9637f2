"""The extras of pyproject.toml: pinned as requirements.txt pins them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    found = (re.fullmatch(r"([\w.-]+)==([\w.]+)", line.partition(";")[0].strip()) for line in lines
             if "==" in line and not line.startswith("#"))
    return {canonicalize_name(match[1]): match[2] for match in found}


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


def test_the_lock_has_the_pins_of_the_requirements():
    locked = pins((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    # torch alone is installed before, in the build of the machine; uv installs the lock
    assert {name: version for name, version in REQUIRED.items() if name not in ("torch", "uv")}.items() <= locked.items()
    assert "torch" not in locked


def test_the_lock_needs_nothing_that_it_does_not_have():
    """It is installed without dependencies."""
    locked = pins((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    lacking = []
    for name in locked:
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            # of another system
            continue
        for need in needs:
            other = canonicalize_name(need.name)
            wanted = (need.marker is None or need.marker.evaluate({"extra": ""})) and other != "torch"
            if wanted and not (other in locked and need.specifier.contains(locked[other], prereleases=True)):
                lacking.append(f"{name} {version(name)} needs {need}")
    assert not lacking
