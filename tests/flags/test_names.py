"""The names of flags/: all there, each loaded when it is asked for."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import flags
from config import ROOT


def loaded_after(code):
    """Files of flags/ that a fresh process has loaded after some code."""
    told = "import sys; print(*(name for name in sys.modules if name.startswith('flags.')))"
    said = subprocess.run([sys.executable, "-c", f"{code}; {told}"],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(said.split())


def test_every_name_is_there():
    assert all(getattr(flags, name) is not None for name in flags.__all__)
    assert len(set(flags.COMMANDS)) == len(flags.COMMANDS) > len(flags.ALL) > 10
    assert set(flags.TRAINED.values()) <= set(flags.COMMANDS)
    with pytest.raises(AttributeError, match="no attribute 'NothingArgs'"):
        flags.NothingArgs  # noqa: B018 - asking is the test


def test_a_type_checker_sees_the_same_names():
    tree = ast.parse((ROOT / "flags" / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {(node.module, alias.asname) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names if alias.asname}
    wanted = {(f"flags.{file}", name) for file, names in flags._FILES.items() for name in names}
    assert imported == wanted, "flags/__init__.pyi: a line for each name of __init__.py"
    assert {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)} == {"ALL", "COMMANDS"}


def test_every_command_of_every_file_has_its_name_here():
    for file in sorted((ROOT / "flags").glob("[a-z]*.py")):
        module = importlib.import_module(f"flags.{file.stem}")
        own = {name for name, kind in inspect.getmembers(module, inspect.isclass)
               if kind.__module__ == module.__name__ and name.endswith("Args") and not name.startswith("_")}
        assert own <= set(flags.__all__), f"{file.name}: name them in flags/__init__.py"
        assert all(getattr(flags, name) is getattr(module, name) for name in own)


def test_a_command_loads_its_own_file_and_no_other_command():
    assert loaded_after("from flags import MergeArgs") == {"flags.base", "flags.merge"}
    # keys that most presets have in common are known without the classes of all commands
    assert loaded_after("from flags.base import known; assert known('model_name_or_path')") == {"flags.base"}


def test_a_flag_of_any_command_is_known():
    from flags.base import known

    assert known("template")
    assert known("lora_r")
    assert known("gate_loss_weight")
    assert not known("lora_s")
