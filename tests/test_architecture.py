"""The house rules of the repository, read from its source: floors, circles, sizes, forbidden calls, instant help."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: From the ground up: what stands on one line is one wing or several side by side. A file belongs to the longest prefix that
#: fits; it may import from lower lines and from its own wing, nothing else. docs/architecture.md draws the same picture.
LADDER: tuple[tuple[str, ...], ...] = (
    ("errors.py", "locks.py", "runtime.py", "scalars.py"),
    ("preset_choice.py",),
    ("config.py", "manifest.py"),
    ("console.py",),
    ("flags/",),
    ("data/",),
    ("data/readers/",),
    ("data/prompt_styles.py",),
    ("data/sets/",),
    ("data/sources.py", "data/safety_sets.py"),
    ("models/",),
    ("models/checkpoints/", "models/run_folders.py"),
    ("models/base/", "models/operators/"),
    ("models/adapters/",),
    ("models/task_vectors.py",),
    ("models/mask/", "models/moe/", "models/merging/"),
    ("models/realign/", "models/export/"),
    ("models/runs.py",),
    ("models/generation/", "models/footprint/"),
    ("models/llama_moe.py", "models/fuse.py"),
    ("training/",),
    ("evaluator/judges/", "evaluator/statistics/", "evaluator/sandbox/"),
    ("evaluator/scoring/",),
    ("evaluator/reporting/",),
    ("evaluator/",),
    ("align_basemodel.py", "inference.py"),
    ("scripts/", "workflow/", "benchmarks/"),
)
RANK = {prefix: rank for rank, prefixes in enumerate(LADDER) for prefix in prefixes}
MOST_LINES, MOST_FILES = 400, 16
#: Folders whose files are many by nature: one per command, per judge, per thing tested.
CROWDED = ("flags", "evaluator/judges", "tests")
#: The floors that need the standard library and yaml only, so that --help is instant.
LIGHT = ("errors.py", "locks.py", "runtime.py", "scalars.py", "preset_choice.py", "config.py", "manifest.py", "console.py",
         "flags/")
SKIPPED = {".git", ".venv", "results", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


def sources(*suffixes: str) -> list[Path]:
    """Files of the repository with one of these suffixes, relative to its root."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.endswith(".egg-info"))
        found += [Path(folder, name).relative_to(ROOT) for name in sorted(names) if name.endswith(suffixes)]
    return found


PYTHON = sources(".py")
CODE = [path for path in PYTHON if path.parts[0] != "tests"]
COMMANDS = [path for path in CODE if re.search(r"^def main\(", (ROOT / path).read_text(encoding="utf-8"), re.M)]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in CODE}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of every absolute import, those inside functions included."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "." * node.level + (node.module or "")))
    return found


@cache
def uses(path: Path) -> dict[Path, int]:
    """The repository's files that a file imports, each with the line; a module of a package counts, not the package."""
    found: dict[Path, int] = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [module if (module := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names]
        else:
            continue
        for name in names:
            if name in MODULES and MODULES[name] != path:
                found.setdefault(MODULES[name], node.lineno)
    return found


def wing(path: Path) -> str:
    """The longest prefix of ``LADDER`` that a file lies under; empty where there is none."""
    name = path.as_posix()
    fitting = [prefix for prefix in RANK if name == prefix or (prefix.endswith("/") and name.startswith(prefix))]
    return max(fitting, key=len, default="")


def circles(graph: dict[Path, dict[Path, int]]) -> list[str]:
    """One circle of imports for each knot of files that import each other, however many steps it takes."""
    found: list[str] = []
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> None:
        if path in way:
            found.append(" -> ".join(str(step) for step in [*way[way.index(path):], path]))
        elif path not in done:
            for other in sorted(graph[path]):
                visit(other, [*way, path])
            done.add(path)

    for start in graph:
        visit(start, [])
    return found


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_walk_sees_the_repository():
    assert {"align_basemodel.py", "inference.py", "config.py"} <= {str(path) for path in CODE}
    assert {"models/llama_moe.py", "align_basemodel.py", "inference.py"} <= {path.as_posix() for path in COMMANDS}


@pytest.mark.parametrize("path", CODE, ids=str)
def test_every_file_has_a_floor_and_imports_only_go_down(path):
    mine = wing(path)
    assert mine, f"{path}: give it a place in LADDER and in docs/architecture.md"
    up = [f"{path}:{line} imports {other} ({wing(other)} is not below {mine})" for other, line in uses(path).items()
          if wing(other) != mine and RANK[wing(other)] >= RANK[mine]]
    assert not up


def test_no_files_import_each_other():
    assert not circles({path: uses(path) for path in CODE})


def test_a_circle_is_found_however_long():
    a, b, c, d = (Path(name) for name in "abcd")
    assert circles({a: {b: 1}, b: {c: 1}, c: {}, d: {a: 1}}) == []
    assert circles({a: {b: 1}, b: {c: 1}, c: {a: 1}, d: {a: 1}}) == ["a -> b -> c -> a"]


def test_no_folder_holds_more_than_sixteen_files():
    counts = Counter(path.parent.as_posix() for path in PYTHON)
    crowded = {folder: count for folder, count in counts.items()
               if count > MOST_FILES and not any(folder == name or folder.startswith(f"{name}/") for name in CROWDED)}
    assert not crowded


def test_nothing_beside_a_command_hides_a_module_of_the_root():
    """Python looks in a script's own folder first: scripts/presets would be taken for a module presets."""
    tops = {path.parts[0].removesuffix(".py") for path in CODE}
    beside = [place for folder in {path.parent for path in COMMANDS} - {Path()} for place in (ROOT / folder).iterdir()]
    hiding = [place.relative_to(ROOT).as_posix() for place in beside
              if place.name.removesuffix(".py") in tops and (place.is_dir() or place.suffix == ".py")]
    assert not hiding


def test_imports_are_absolute():
    relative = [f"{path}:{line}" for path in PYTHON for line, name in imported(tree(path)) if name.startswith(".")]
    assert not relative


def test_floor_one_needs_the_standard_library_and_yaml_only():
    light = [path for path in CODE if wing(path) in LIGHT]
    allowed = {*sys.stdlib_module_names, "yaml", *(path.parts[0].removesuffix(".py") for path in light)}
    odd = [f"{path}:{line} imports {name}" for path in light for line, name in imported(tree(path))
           if name.split(".")[0] not in allowed]
    assert not odd


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_no_file_above_400_lines(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_file_is_called_utils_helpers_or_common():
    assert not [path for path in PYTHON if path.stem in ("utils", "util", "helpers", "common")]


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_no_import_path_edits_no_pickle_no_remote_code(path):
    module, wrong = tree(path), []
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and dotted(node) == "sys.path":
            wrong.append(f"{path}:{node.lineno} touches the import path")
        if not isinstance(node, ast.Call):
            continue
        if dotted(node.func) in ("torch.load", "torch.save", "site.addsitedir", "np.load", "numpy.load"):
            safe = dotted(node.func).endswith("p.load") and not _allows_pickle(node)
            wrong += [] if safe else [f"{path}:{node.lineno} calls {dotted(node.func)}"]
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle") and getattr(keyword.value, "value", True):
                wrong.append(f"{path}:{node.lineno} passes {keyword.arg}")
    wrong += [f"{path}:{line} imports {name}" for line, name in imported(module)
              if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")]
    assert not wrong


def _allows_pickle(call: ast.Call) -> bool:
    return any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in call.keywords)


def test_nothing_names_a_folder_of_one_machine():
    places = "|".join(("tmp", "work", "home", "root", "mnt", "Users", "scratch"))
    pattern = re.compile(rf"(?<![\w.$}}/)*-])/(?:{places})(?=/|\b)|[A-Z]:\\\\")
    hits = [f"{path}:{number}: {line.strip()}" for path in sources(".py", ".sh", ".yaml", ".yml", ".toml", ".md")
            for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
            if pattern.search(line)]
    assert not hits


def test_no_print_below_the_commands():
    screens = ("errors.py", "console.py")
    printing = [f"{path}:{node.lineno}" for path in CODE if path not in COMMANDS and path.name not in screens
                and RANK[wing(path)] < RANK["evaluator/judges/"] for node in ast.walk(tree(path))
                if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    assert not printing


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_help_is_instant_and_loads_no_torch(path):
    """Run as the papers' readers do: from the file's own folder, by its bare name."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", path.name, "--help"], cwd=(ROOT / path).parent, capture_output=True,
        text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in run.stderr.splitlines()
              if line.startswith("import time:")}
    rest = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 0, "\n".join(rest)
    assert "argparse" in loaded
    assert "usage:" in run.stdout
    assert not loaded & {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pandas", "matplotlib"}
