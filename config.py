"""Command lines: one dataclass per command becomes its flags; presets fill in, flags win, every error comes at once.

Order of precedence: dataclass default < preset (``preset_choice.py`` says which) < flag. Never imports torch, so that
``--help`` is instant. The dataclasses themselves stand in ``flags/``: groups of flags (``flags.base.Flags``), and commands
that are made of groups. ``--help`` prints by group, with the values that this command line would use.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import inspect
import logging
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

import preset_choice
from errors import UserError, nearest
from preset_choice import DEFAULT_PRESET, OWN_PRESET, PRESETS, SECTIONS
from scalars import BOOLEANS, Word, Yaml, article, cast, words_in

__all__ = ["DEFAULT_PRESET", "PRESETS", "Parsed", "flag", "group_of", "parse"]
#: A class of ``flags.base.Flags``, which stands above this file.
Command = Any
log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent
#: Flags whose value is a file, a folder or a name: an empty one is none.
_PLACES = ("data_path", "validation_path", "extra_data", "init_adapter", "prompt_style_file", "model_name_or_path",
           "output_dir")
_NUMBER = re.compile(r"-\d+|[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|-\.?\d[\d.]*|-inf|-nan")


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
        plan: what --plan and its kin asked for, where they did.
        verbosity: what --quiet and --verbose asked for.
    """

    args: Any
    training: dict[str, Any]
    preset: str
    given: frozenset[str]
    plan: Any = None
    verbosity: Any = None


def parse(command: Command, argv: Sequence[str] | None = None) -> Parsed:
    """Resolve a command line against preset and defaults; ``--help`` prints what it would resolve to and leaves.

    Args:
        command: a command of ``flags/``; one whose class depends on the words (``deciding``) is chosen by them first.
        argv: the words after the program name; None reads ``sys.argv``.

    Raises:
        UserError: with every problem found: unknown flags (with the nearest known one, or whose they are), wrong
            types, values that are not allowed, unknown preset keys, and what ``command.problems`` finds.
    """
    words = sys.argv[1:] if argv is None else argv
    choice = preset_choice.choose(words)
    path, content, preset = choice.path, choice.content, choice.name
    beside, words, wrong = _beside(command, words)
    plan, verbosity = beside.get("Plan"), beside["Output"]
    command, problems = _chosen(command, words, content)
    problems += wrong
    known, rest = _parser(command).parse_known_args(_words(command, words))
    given = {k: v for k, v in vars(known).items() if k not in ("preset", "help")}
    idle: list[str] = []
    extra = _extra_flags(command, rest, problems, idle)
    values: dict[str, Any] = {}
    training: dict[str, Any] = {}
    texts = _convert(command, given, "--", problems)
    sections = command.sections(texts)
    found = _preset_values(command, path, content, sections, problems)
    replaced = _of_other_data(command, choice, sections, found, problems)
    for name, value in found.items():
        (values if name in _fields(command) else training)[name] = value
    values = _convert(command, values, f"{path.name}: ", problems)
    said = choice.line({name: found[name] for name in choice.data_keys if name in found.keys() - {*given, *extra}},
                       any(content.get(section) for section in sections if section != "common"))
    if "help" in known:
        where = {**dict.fromkeys({**values, **training}, f"preset {preset}"),
                 **dict.fromkeys(replaced, f"preset {OWN_PRESET}"), **dict.fromkeys({**texts, **extra}, "command line")}
        _parser(command, {**values, **texts}, {**training, **extra}, where, said).print_help()
        sys.exit(0)
    values.update(texts)
    training.update(extra)
    # what did not convert keeps its default here, so that one typo does not hide the other errors
    args = command(**values)
    problems += [*_range_problems(args), *args.problems(), *command.training_problems(training), *args.clashes(training)]
    # --data_path "$MINE" without a MINE would train on the embedded data
    problems += [f"--{name}: is empty; give a place, or leave the flag out (a shell variable without a value?)"
                 for name in _PLACES if texts.get(name) == ""]
    problems += [f"--{name} {values[name]}: {why}" for name, why in command.idle(values).items() if name in texts]
    if problems:
        raise UserError(*problems)
    # first of all output, before a command has set up its log; once, not once a rank
    if not verbosity.quiet:
        if said and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{said}\n")
        for name in [*idle, *(command.without_effect().keys() & given.keys())]:
            log.warning("--%s: has no effect here (%s)", name, command.without_effect()[name])
    return Parsed(args, training, preset, frozenset(given), plan if plan and plan.plan else None, verbosity)


@functools.cache
def group_of(command: Command, name: str) -> Command:
    """The group that declares a flag of a command: a command that only changes its default does not own it."""
    return [kind for kind in command.__mro__ if name in inspect.get_annotations(kind)][-1]


def _beside(command: Command, words: Sequence[str]) -> tuple[dict[str, Any], Sequence[str], list[str]]:
    """What is asked beside the settings, by the group's heading, the words that are left, and what is wrong."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    for group in command.beside():
        parser = _Parser(add_help=False, allow_abbrev=False)
        for name in _fields(group):
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if _kind(group, name) is bool else {}
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **switch)
        known, words = parser.parse_known_args(_words(group, words))
        asked = found[group.heading] = group(**_convert(group, vars(known), "--", problems))
        problems += [*_range_problems(asked), *asked.problems()]
    return found, words, problems


def _chosen(command: Command, words: Sequence[str], content: dict[str, Any]) -> tuple[type, list[str]]:
    """The class that a command's deciding flags ask for, here or in the preset, and what is wrong with them together."""
    if not command.deciding:
        return command, []
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in command.deciding:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    given = vars(parser.parse_known_args(_words(command, words))[0])
    preset = {name: body[name] for section in command.sections({}) if (body := content.get(section))
              for name in command.deciding if name in body}
    # values that are not allowed are reported when the flags of the chosen class are read
    return command.chosen(_convert(command, given, "--", []), _convert(command, preset, "", []))


def _parser(command: Command, values: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
            where: dict[str, str] | None = None, taken: str = "") -> argparse.ArgumentParser:
    """The parser of a command; for ``--help`` with the values in force and where they come from, and why this preset."""
    values, training, where = values or {}, training or {}, where or {}
    first = f"{command.positional.upper()} " if command.positional else ""
    parser = _Parser(description=inspect.cleandoc(command.__doc__ or ""), allow_abbrev=False, add_help=False,
                     usage=f"%(prog)s {first}[--FLAG VALUE ...]", formatter_class=argparse.RawDescriptionHelpFormatter)
    general = parser.add_argument_group("Help and presets")
    general.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                         help="show these flags with the values that this command line and its preset give them")
    chosen = f"default: {DEFAULT_PRESET} for its own base, {OWN_PRESET} for any other{taken and f'; here: {taken}'}"
    general.add_argument("--preset", default=argparse.SUPPRESS, help=f"name or .yaml path ({chosen})".replace("%", "%%"))
    groups: dict[str, Any] = {}
    order = {kind: (kind.general, i) for i, kind in enumerate(command.__mro__[:-1])}
    listed = [(command, *row) for row in sorted(_fields(command).items(), key=lambda row: order[group_of(command, row[0])])]
    listed += [(group, *row) for group in command.beside() for row in _fields(group).items()]
    for source, name, item in listed:
        kind, owner = _kind(source, name), group_of(source, name)
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        choices = item.metadata["choices"]
        allowed = f"; one of {', '.join(str(c) for c in choices if c != '')}" if choices else ""
        text = f"{item.metadata['help']}{allowed} ({_in_force(values.get(name, item.default), where.get(name))})"
        if owner.heading not in groups:
            groups[owner.heading] = parser.add_argument_group(owner.heading)
        groups[owner.heading].add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=kind.__name__,
                                         help=text.replace("%", "%%"), **extra)
    set_here = ", ".join(f"--{name} {value} ({where[name]})" for name, value in training.items())
    parser.epilog = "\n\n".join(filter(None, (
        "Every field of transformers.TrainingArguments is a flag too, e.g. --weight_decay 0.01." if
        command.takes_training_arguments else "", set_here and f"Set here: {set_here}", command.epilog)))
    return parser


def _in_force(value: Any, where: str | None) -> str:
    shown = "empty" if value in (None, "") else str(value).lower() if isinstance(value, bool) else value
    return f"given: {shown}" if where == "command line" else f"default: {shown}{f', {where}' if where else ''}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _fields(command: Command) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(command)}


@functools.cache
def _kinds(command: Command) -> dict[str, Any]:
    return typing.get_type_hints(command)


def _kind(command: Command, name: str) -> type:
    """The scalar type of a field; ``float | None`` counts as float."""
    kind = _kinds(command)[name]
    return next((k for k in typing.get_args(kind) if k is not type(None)), kind)


def _convert(command: Command, values: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, value in values.items():
        kind = _kind(command, name)
        # "learning_rate:" with nothing behind it: where no value means something, None is one
        if value is None and type(None) not in typing.get_args(_kinds(command)[name]):
            problems.append(f"{prefix}{name}: is empty and needs {article(kind)}; give one, or drop the key")
            continue
        try:
            done[name] = cast(kind, value)
        except (LookupError, TypeError, ValueError):
            problems.append(f"{prefix}{name} {value}: needs {article(kind)}")
            continue
        choices = _fields(command)[name].metadata["choices"]
        if choices and done[name] is not None and done[name] not in choices:
            near = nearest(str(done[name]), [str(c) for c in choices])
            allowed = ", ".join(str(choice) or "empty" for choice in choices)
            problems.append(f"{prefix}{name} {value}: not known{near}; allowed: {allowed}")
            del done[name]
    return done


def _range_problems(args: Any) -> list[str]:
    found = []
    for name, item in _fields(type(args)).items():
        low, value = item.metadata["low"], getattr(args, name)
        if low is not None and value is not None and not (math.isfinite(value) and value >= low):
            found.append(f"--{name} {value}: must be {low} or more, and finite")
    return found


def _preset_values(command: Command, path: Path, content: dict[str, Any], sections: Iterable[str],
                   problems: list[str]) -> dict[str, Any]:
    problems += [f"{path.name}: unknown section '{section}'{nearest(section, SECTIONS)}; allowed: {', '.join(SECTIONS)}"
                 for section in content if section not in SECTIONS]
    merged: dict[str, Any] = {}
    for section in sections:
        for name, value in (content.get(section) or {}).items():
            if name in _fields(command) or (section != "common" and _is_training_field(command, name)):
                merged[name] = value if name in _fields(command) else _training_value(
                    name, value, f"{path.name}: ", problems)
            elif not command.passes_over(section, name):
                said = command.elsewhere(name) if section != "common" else None
                problems.append(f"{path.name}: {section}.{name}: {said or f'unknown key{nearest(name, _fields(command))}'}")
    return merged


def _of_other_data(command: Command, choice: preset_choice.Choice, sections: Sequence[str], found: dict[str, Any],
                   problems: list[str]) -> list[str]:
    """Give the keys that count a preset's own data the values of the preset ``own``, in ``found``; returns their names."""
    asked = [name for name in choice.instead if name in found]
    if asked:
        path = preset_choice.preset_path(OWN_PRESET)
        content = {section: body for section, body in preset_choice.read(path).items() if section != "for"}
        other = _preset_values(command, path, content, sections, problems)
        for name in asked:
            del found[name]  # a key that own lacks has the command's default
        found.update({name: other[name] for name in asked if name in other})
    return asked


def _extra_flags(command: Command, rest: Sequence[str], problems: list[str], idle: list[str]) -> dict[str, Any]:
    """The flags that are not ours: TrainingArguments fields pass through, those without effect go to ``idle``, anything
    else is an error."""
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
            try:
                parsed = yaml.load(value, Loader=Yaml) if value else True
            except yaml.YAMLError:
                problems.append(f"--{name} {value}: is neither a value nor JSON; quote it, e.g. '{{\"min_lr\": 1e-6}}'")
                continue
            found[name] = _training_value(name, parsed, "--", problems)
        elif name in command.without_effect():
            idle.append(name)
        elif said := command.elsewhere(name):
            problems.append(f"--{name}{f' {value}' if value else ''}: {said}")
        else:
            allowed = [*_fields(command), *(training_fields() if command.takes_training_arguments else ()),
                       *(name for group in command.beside() for name in _fields(group))]
            problems.append(f"--{name}: unknown flag{nearest(name, allowed)}; see --help")
    return found


def _words(command: Command, argv: Sequence[str]) -> list[str]:
    """The command line with --our-flag spelt --our_flag, a negative value joined to its flag, a first value to its own."""
    words: list[str] = []
    if command.positional and argv and not argv[0].startswith("-"):
        argv = [f"--{command.positional}={argv[0]}", *argv[1:]]
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


def _training_value(name: str, value: Any, prefix: str, problems: list[str]) -> Any:
    """A field of TrainingArguments in its declared type, where it has one; what does not fit is a problem."""
    kinds = {kind.strip() for kind in training_fields()[name].split("|")} - {"None"}
    kind = {"bool": bool, "int": int, "float": float}.get("".join(kinds))
    if not isinstance(value, str) and (words := words_in(value)):
        problems.append(f"{prefix}{name} {value}: {', '.join(words)}: write true or false, or quotes around a text")
    value = str(value) if isinstance(value, Word) else value
    if name == "resume_from_checkpoint":  # a path or a switch, though it is declared as text
        return BOOLEANS.get(str(value).lower(), value)
    if name.endswith("_kwargs") and not isinstance(value, dict | None) and not str(value).startswith("{"):
        problems.append(f"{prefix}{name} {value}: needs a mapping, e.g. '{{\"min_lr\": 1e-6}}'")
    if kind is None or value is None or (kind is float and type(value) is int):
        return value
    try:
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(value)
        return cast(kind, value)
    except (LookupError, TypeError, ValueError):
        problems.append(f"{prefix}{name} {value}: needs {article(kind)}")
        return value


def _is_training_field(command: Command, name: str) -> bool:
    return command.takes_training_arguments and name in training_fields()


@functools.cache
def training_fields() -> dict[str, str]:
    """Fields of ``transformers.TrainingArguments`` -> types, read from its source so that torch stays unloaded."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed: run bash scripts/quickstart.sh, or pip install -r requirements.txt")
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            declared = [(n.target.id, n.annotation) for n in node.body
                        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            return {name: ast.unparse(kind) for name, kind in declared if not name.startswith("_")}
    raise RuntimeError("transformers/training_args.py has no class TrainingArguments")
