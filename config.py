"""Command lines: one dataclass per command becomes its flags; presets fill in, flags win, every error comes at once.

Order of precedence: dataclass default < preset (``scripts/presets/NAME.yaml``) < flag. Never imports torch, so that
``--help`` is instant. The dataclasses themselves stand in ``flags/``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from errors import UserError

ROOT = Path(__file__).resolve().parent
PRESETS = ROOT / "scripts" / "presets"
DEFAULT_PRESET = "embedded"
_NUMBER = re.compile(r"-\d+|[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|-\.?\d[\d.]*|-inf|-nan")
SECTIONS = (
    "common", "align", "align_expert", "align_mix", "align_skill", "align_dialogs", "align_moe", "align_dpo", "align_mask",
    "fuse", "inference", "evaluate", "report",
)


def short_waits() -> None:
    """Let OpenMP threads that wait spin for microseconds, then sleep. Read when torch is imported, so call it before.

    Without end (the runtime's default) two processes on the same cores take twice as long; not at all ("passive") steps of
    many small operations take a third longer. An OMP_WAIT_POLICY that the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # for runtimes other than GNU's
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step instead of giving it back to the kernel; False without glibc.

    A training step takes and frees the same large blocks again and again, and the kernel clears every page of them each
    time: half of a step of DPO or of a mask. Settings of the user (MALLOC_...) stay. Not for commands that promise a limit
    of memory.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    names = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**30), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}  # malloc.h; -1: never trim
    return all([mallopt(*option) == 1 for name, option in names.items() if name not in os.environ])


def flag(default: Any, help: str, *, choices: Sequence[Any] | None = None, low: float | None = None) -> Any:
    """A dataclass field that is also a flag: its help text, the values it allows, its lower bound."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass(frozen=True)
class Parsed:
    """What a command line resolved to.

    Args:
        args: the command's dataclass, every value resolved.
        training: flags and preset keys that are fields of ``transformers.TrainingArguments`` and not ours.
        preset: the preset's name or path, as given.
        given: names of the flags on the command line (not from the preset).
    """

    args: Any
    training: dict[str, Any]
    preset: str
    given: frozenset[str]


def parse(command: type, argv: Sequence[str] | None = None) -> Parsed:
    """Resolve a command line against preset and defaults.

    Args:
        command: a dataclass of ``flags/`` with ``sections(given)`` and ``problems(values)``.
        argv: the words after the program name; None reads ``sys.argv``.

    Raises:
        UserError: with every problem found: unknown flags (with the nearest known one), wrong types, values that are
            not allowed, unknown preset keys, and what ``command.problems`` finds.
    """
    parser = _parser(command)
    known, rest = parser.parse_known_args(_words(command, sys.argv[1:] if argv is None else argv))
    given = {k: v for k, v in vars(known).items() if k != "preset"}
    preset = getattr(known, "preset", None) or DEFAULT_PRESET
    problems: list[str] = []
    extra = _extra_flags(command, rest, problems)
    path = preset_path(preset)
    values: dict[str, Any] = {}
    training: dict[str, Any] = {}
    texts = _convert(command, given, "--", problems)
    for name, value in _preset_values(command, path, command.sections(texts), problems).items():
        (values if name in _fields(command) else training)[name] = value
    values = _convert(command, values, f"{path.name}: ", problems)
    values.update(texts)
    training.update(extra)
    # what did not convert keeps its default here, so that one typo does not hide the other errors
    args = command(**values)
    problems += [*_range_problems(args), *command.problems(args)]
    if problems:
        raise UserError(*problems)
    return Parsed(args, training, preset, frozenset(given))


def preset_path(preset: str) -> Path:
    """The YAML file of a preset given by name or by path; a UserError lists the known names."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        raise UserError(
            f"--preset {preset}: no such preset{_nearest(preset, names)}; known: {', '.join(names)}; or give a .yaml path"
        )
    return path


def _parser(command: type) -> argparse.ArgumentParser:
    parser = _Parser(
        description=command.__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default=argparse.SUPPRESS, help=f"name or .yaml path (default: {DEFAULT_PRESET})")
    for name, item in _fields(command).items():
        kind = _kind(command, name)
        extra = {"nargs": "?", "const": "true"} if kind is bool else {}
        choices = item.metadata["choices"]
        listed = f"; one of {', '.join(map(str, choices))}" if choices else ""
        text = f"{item.metadata['help']}{listed} (default: {item.default})".replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=kind.__name__, help=text, **extra)
    if command.takes_training_arguments:
        parser.epilog = "Every field of transformers.TrainingArguments is a flag too, e.g. --weight_decay 0.01."
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _fields(command: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(command)}


@functools.cache
def _kinds(command: type) -> dict[str, Any]:
    return typing.get_type_hints(command)


def _kind(command: type, name: str) -> type:
    """The scalar type of a field; ``float | None`` counts as float."""
    kind = _kinds(command)[name]
    return next((k for k in typing.get_args(kind) if k is not type(None)), kind)


def _convert(command: type, values: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, value in values.items():
        kind = _kind(command, name)
        try:
            done[name] = _cast(kind, value)
        except (TypeError, ValueError):
            problems.append(f"{prefix}{name} {value}: needs {_article(kind)}")
            continue
        choices = _fields(command)[name].metadata["choices"]
        if choices and done[name] is not None and done[name] not in choices:
            near = _nearest(str(done[name]), [str(c) for c in choices])
            problems.append(f"{prefix}{name} {value}: not known{near}; allowed: {', '.join(map(str, choices))}")
            del done[name]
    return done


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")


def _cast(kind: type, value: Any) -> Any:
    if value is None:
        return None
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise ValueError(value)
        return words[str(value).lower()]
    if kind is str and isinstance(value, list):
        return ",".join(map(str, value))
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return kind(value)


def _range_problems(args: Any) -> list[str]:
    found = []
    for name, item in _fields(type(args)).items():
        low, value = item.metadata["low"], getattr(args, name)
        if low is not None and value is not None and not (math.isfinite(value) and value >= low):
            found.append(f"--{name} {value}: must be {low} or more, and finite")
    return found


def _preset_values(command: type, path: Path, sections: Iterable[str], problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a preset is a mapping of sections; allowed: {', '.join(SECTIONS)}")
    for section, body in content.items():
        if not isinstance(body, dict | None):
            raise UserError(f"{path.name}: section '{section}' must hold 'key: value' lines, not {body!r}")
        if section not in SECTIONS:
            problems.append(f"{path.name}: unknown section '{section}'{_nearest(section, SECTIONS)}; "
                            f"allowed: {', '.join(SECTIONS)}")
    merged: dict[str, Any] = {}
    for section in sections:
        for name, value in (content.get(section) or {}).items():
            # `common` serves every command: a key that another command owns is passed over here
            if name in _fields(command) or (section != "common" and _is_training_field(command, name)):
                merged[name] = value if name in _fields(command) else _plain(value)
            elif section != "common" or name not in command.names_everywhere():
                near = _nearest(name, _fields(command))
                problems.append(f"{path.name}: {section}.{name}: unknown key{near}")
    return merged


def _extra_flags(command: type, rest: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The flags that are not ours: TrainingArguments fields pass through, anything else is an error."""
    found: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            problems.append(f"{word}: a value without a flag; see --help")
            continue
        if not value and words and not words[0].startswith("--"):
            value = words.pop(0)
        if _is_training_field(command, name):
            found[name] = _plain(yaml.safe_load(value)) if value else True
        else:
            allowed = [*_fields(command), *(training_fields() if command.takes_training_arguments else ())]
            problems.append(f"--{name}: unknown flag{_nearest(name, allowed)}; see --help")
    return found


def _words(command: type, argv: Sequence[str]) -> list[str]:
    """The command line with --our-flag spelt --our_flag, and a negative value joined to its flag."""
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_") if name.startswith("--") else name
        if name.startswith("__") and name[2:] in _fields(command):
            word = f"--{name[2:]}{equals}{value}"
        # argparse takes -1e-3 for a flag; the range check has the better message
        if _NUMBER.fullmatch(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; here it is a number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _is_training_field(command: type, name: str) -> bool:
    return command.takes_training_arguments and name in training_fields()


@functools.cache
def training_fields() -> frozenset[str]:
    """Names of the fields of ``transformers.TrainingArguments``, read from its source so that torch stays unloaded."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed: run bash scripts/quickstart.sh, or pip install -r requirements.txt")
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            names = (n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
            return frozenset(n for n in names if not n.startswith("_"))
    raise RuntimeError("transformers/training_args.py has no class TrainingArguments")


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""
