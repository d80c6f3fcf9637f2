"""The extras of pyproject.toml: pinned as requirements.txt pins them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_architecture import CODE

from config import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
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


def test_the_range_of_a_users_package_begins_with_what_the_tests_ran_with():
    needs = [Requirement(line) for line in PROJECT["dependencies"]]
    assert len(needs) > 10
    for need in needs:
        pin = Version(REQUIRED[canonicalize_name(need.name)])
        (bound,) = need.specifier
        assert bound.operator == "~="
        assert bound.contains(pin)
        assert pin.release[:2] == Version(bound.version).release[:2]


def test_what_the_packages_import_comes_with_an_install():
    """At the head of a file: what is imported where it is needed may be of an extra."""
    # the sandbox's files start alone and import their neighbours by name
    ours = {name for path in CODE for name in (path.parts[0], path.stem)}
    found = {name for path in CODE if path.parts[0] not in ("scripts", "workflow", "benchmarks")
             for name in imported_at_the_head(path)} - ours - set(sys.stdlib_module_names)
    assert {"torch", "transformers", "yaml"} <= found
    # which torch, transformers and datasets need
    brought = {"numpy", "tokenizers", "jinja2", "triton", "pyarrow", "huggingface_hub"}
    called = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    installed = {called.get(name, name) for name in (Requirement(line).name.lower() for line in PROJECT["dependencies"])}
    assert found <= installed | brought


def imported_at_the_head(path):
    """Packages that a file imports when it is imported itself."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    lines = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.partition(".")[0] for node in lines
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names])}


def test_a_version_is_the_same_wherever_it_stands():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    logged = re.search(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert cited[1] == logged[1].split(" ")[0] == PROJECT["version"]


def test_the_oldest_python_is_told_everywhere_and_every_pin_runs_on_it():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in script
    assert f"older than {oldest};" in script
    refusing = []
    for name in REQUIRED:
        try:
            needs = metadata(name)["Requires-Python"]
        except PackageNotFoundError:
            # of another system
            continue
        if needs and f"{oldest}.0" not in SpecifierSet(needs):
            refusing.append(f"{name} needs Python {needs}")
    assert not refusing


def test_the_linter_of_a_commit_is_that_of_the_tests():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"ruff=={REQUIRED['ruff']}" in text


@pytest.mark.parametrize("path", [
    "flags/merge.py", "models/merging/methods.py", "models/operators/parameters.py", "data/sets/protocols.yaml",
    "evaluator/judges/table.py", "scripts/presets/h3fusion.yaml", "scripts/test.sh"])
def test_a_commit_that_may_age_the_reference_is_checked(path):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (hook,) = (hook for hook in hooks if hook["id"] == "reference")
    assert re.search(hook["files"], path)
    assert (ROOT / path).is_file()


def test_the_lock_has_the_pins_of_the_requirements():
    locked = pins((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    # torch alone is installed before, in the build of the machine; uv installs the lock
    assert {name: version for name, version in REQUIRED.items() if name not in ("torch", "uv")}.items() <= locked.items()
    assert "torch" not in locked


def test_the_lock_holds_pins_alone():
    """A folder in it would be one of the machine that wrote it, and its install would end on every other."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []


def test_the_lock_is_made_without_torch_and_its_cuda_build(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "requirements.lock", "pyproject.toml", "scripts/lock.sh", "scripts/environment.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    places = tmp_path / "env" / "bin"
    places.mkdir(parents=True)
    stamp = "cat requirements.txt requirements.lock pyproject.toml | cksum > env/.installed"
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    # in the place of uv: it notes what it was asked, and writes what uv writes on Linux
    (places / "uv").write_text("""#!/bin/bash
echo "$@" > env/asked
while [ "$1" != --output-file ]; do shift; done
cp "$2" env/before
printf 'cuda-toolkit==13.0.3\\nnumpy==2.4.6\\nnvidia-nvtx==13.0.85\\n' > "$2"
""")
    (places / "uv").chmod(0o755)
    old = (tmp_path / "requirements.lock").read_text()
    subprocess.run(["bash", "scripts/lock.sh", "--upgrade"], cwd=tmp_path, check=True, timeout=60,
                   env={"PATH": "/usr/bin:/bin", "ABF_VENV": str(tmp_path / "env")})
    asked = (tmp_path / "env" / "asked").read_text()
    assert "--no-emit-package torch" in asked
    assert asked.endswith("--upgrade\n")
    # so that uv keeps its versions
    assert (tmp_path / "env" / "before").read_text() == old
    new = (tmp_path / "requirements.lock").read_text().splitlines()
    assert new == [*(line for line in old.splitlines() if line.startswith("#")), "numpy==2.4.6"]


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
