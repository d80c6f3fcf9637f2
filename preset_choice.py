"""Which preset a command line takes, and why: ``--preset`` names one, else base and data decide.

A preset is a YAML file of ``scripts/presets/``: sections of flags, and a section ``for`` that names the base and the data
that its values were chosen for. Without ``--preset``, the preset ``embedded`` serves the embedded base and every model made
from it; any other base takes ``own``. Never imports torch.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, nearest
from scalars import Yaml

ROOT = Path(__file__).resolve().parent
PRESETS = ROOT / "scripts" / "presets"
DEFAULT_PRESET = "embedded"
#: What any other base takes.
OWN_PRESET = "own"
SECTIONS = (
    "for", "common", "align", "align_expert", "align_safety", "align_mix", "align_skill", "align_dialogs", "align_full",
    "align_moe", "align_dpo", "align_dpo_full", "align_mask", "fuse", "inference", "evaluate", "report",
)
#: Keys of the section ``for``: bases (names, folders), sources of data, and the keys that count rows or tokens of that data.
_BASE, _DATA, _DATA_KEYS = "model_name_or_path", "data_source", "data_keys"
_DECIDING = ("preset", _BASE, "data_path", _DATA)


@dataclass(frozen=True)
class Choice:
    """A preset that was taken.

    Args:
        name: as ``--preset`` would name it.
        path, content: its file and its sections, without ``for``.
        why: in words.
        asked: whether ``--preset`` named it.
        other_base, other_data: what of this command line its values were not chosen for, in words; empty: nothing.
        data_keys: the keys that count rows or tokens of its own data.
    """

    name: str
    path: Path
    content: dict[str, Any]
    why: str
    asked: bool
    other_base: str = ""
    other_data: str = ""
    data_keys: tuple[str, ...] = ()

    @property
    def instead(self) -> tuple[str, ...]:
        """Keys that are not taken from this preset, whose data they count, but from ``own``: unless it was asked for."""
        return self.data_keys if self.other_data and not self.asked else ()

    def line(self, counted: dict[str, Any], serves: bool) -> str:
        """What to say first; empty: nothing.

        Args:
            counted: of ``data_keys``, those that this command reads and that no flag gives, with the values in force.
            serves: whether the preset gives this command more than the section ``common``.
        """
        if not serves:
            return ""
        values = ", ".join(f"{name} {value}" for name, value in counted.items()) if self.other_data else ""
        if not self.asked:
            aside = f"; {values} from preset {OWN_PRESET}, because {self.other_data}" if values else ""
            return f"preset {self.name} ({self.why}{aside}): --preset NAME takes another"
        said = "; ".join(filter(None, (self.other_base, values and f"{values} all the same, although {self.other_data}")))
        return f"preset {self.name}: {said}; --preset {OWN_PRESET} is for any other" if said else ""


def choose(words: Sequence[str]) -> Choice:
    """The preset of a command line.

    Raises:
        UserError: no such preset, no valid YAML, or a section ``for`` that cannot be read.
    """
    given = _given(words)
    asked = given["preset"] is not None
    default = Path(PRESETS, f"{DEFAULT_PRESET}.yaml")
    name, why = given["preset"] or DEFAULT_PRESET, "--preset"
    if not asked:
        chosen_for = _chosen_for(default, read(default))
        base = given[_BASE]
        if base is None or serves_base(base, chosen_for[_BASE]):
            why = "its base" if given["data_path"] or given[_DATA] not in (None, *chosen_for[_DATA]) else "its base and data"
        else:
            name, why = OWN_PRESET, f"--{_BASE} {base} is not {DEFAULT_PRESET}'s base"
    path = preset_path(name)
    content = read(path)
    chosen_for = _chosen_for(path, content)
    content.pop("for", None)
    return Choice(name, path, content, why, asked, *_mismatch(given, content, chosen_for), chosen_for[_DATA_KEYS])


def preset_path(preset: str) -> Path:
    """The YAML file of a preset given by name or by path; a UserError lists the known names."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        raise UserError(
            f"--preset {preset}: no such preset{nearest(preset, names)}; known: {', '.join(names)}; or give a .yaml path"
        )
    return path


def read(path: Path) -> dict[str, Any]:
    """A preset's sections, the caller's own."""
    try:
        # a plan parses hundreds of command lines, most of them with the same preset
        content = copy.deepcopy(_loaded(path.read_text(encoding="utf-8"))) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the preset as UTF-8") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a preset is a mapping of sections; allowed: {', '.join(SECTIONS)}")
    for section, body in content.items():
        if not isinstance(body, dict | None):
            raise UserError(f"{path.name}: section '{section}' must hold 'key: value' lines, not {body!r}")
    return content


@functools.lru_cache(maxsize=16)
def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=Yaml)


def serves_base(base: str, named: Iterable[str]) -> bool:
    """Whether a base is one of those that a preset names: by name, as a local copy, or as a model made from it.

    A folder of the same name as the hub's repository is taken for its copy, the hub's own cache included; a run of ours is
    followed through its manifests to the base that it was made from.
    """
    for _ in range(16):  # a chain of runs; a circle of manifests ends here too
        parts = [part.lower() for part in Path(base).expanduser().parts]
        for name in named:
            last = name.lower().rpartition("/")[2]
            if base == name or "/" in name and parts and (
                    parts[-1] == last or f"models--{name.lower().replace('/', '--')}" in parts):
                return True
        try:
            made = json.loads((Path(base).expanduser() / "manifest.json").read_text(encoding="utf-8"))
            base = str(made["config"][_BASE])
        # no run of ours, or one without a base: what is wrong with it is said where it is loaded
        except (OSError, ValueError, LookupError, TypeError):
            return False
    return False


def _given(words: Sequence[str]) -> dict[str, str | None]:
    """The flags that decide, the last of each; what is wrong with them is said where the command's flags are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _DECIDING:
        # a flag without its value must not end the program here
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?")
    return vars(parser.parse_known_args(list(words))[0])


def _chosen_for(path: Path, content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The section ``for``, checked."""
    body, problems = content.get("for") or {}, []
    allowed = (_BASE, _DATA, _DATA_KEYS)
    problems += [f"{path.name}: for.{key}: unknown key{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
                 for key in body if key not in allowed]
    found = {}
    for key in allowed:
        value = body.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            problems.append(f"{path.name}: for.{key} {value!r}: needs a name or a list of names, e.g. [embedded]")
            value = []
        found[key] = tuple(value)
    sources = ("embedded", "published")
    problems += [f"{path.name}: for.{_DATA} {value}: not known{nearest(value, sources)}; allowed: {', '.join(sources)}"
                 for value in found[_DATA] if value not in sources]
    in_preset = {name for section, body in content.items() if section != "for" for name in body or {}}
    problems += [f"{path.name}: for.{_DATA_KEYS} {key}: no section of this preset has this key{nearest(key, in_preset)}"
                 for key in found[_DATA_KEYS] if key not in in_preset]
    if problems:
        raise UserError(*problems)
    return found


def _mismatch(given: dict[str, str | None], content: dict[str, Any],
              chosen_for: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """Which base and data of the command line are not those that the preset names: a text each, empty where they are."""
    base = given[_BASE] or (content.get("common") or {}).get(_BASE) or "embedded"
    bases, sources = chosen_for[_BASE], chosen_for[_DATA]
    other_base = other_data = ""
    if bases and not serves_base(str(base), bases):
        other_base = f"its values were chosen for {' or '.join(bases)}, not for --{_BASE} {base}"
    if sources:
        if given["data_path"]:
            other_data = f"--data_path {given['data_path']} is not its data"
        elif given[_DATA] not in (None, *sources):
            other_data = f"--{_DATA} {given[_DATA]} is not its data"
    return other_base, other_data
