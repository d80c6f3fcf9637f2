"""Prompt styles: a system text and a frame around the user's words, applied in training and at test alike.

An identity-shift persona is such a style. Ours stand in ``prompt_styles.yaml``; the published ones whose exact bytes matter
(aoa, base, pure_bad) are read from a file of yours, never retyped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from data.readers.dialog_files import read_dialogs
from data.records import Record
from errors import UserError
from flags.base import STYLES

_TABLE = Path(__file__).with_name("prompt_styles.yaml")
SLOT = "%s"


@dataclass(frozen=True)
class Style:
    """A way to put a question.

    Args:
        system: the system text, byte for byte; empty: none.
        user: the frame, with ``%s`` where the user's words go.
        file: whether the system text has to come from the user's file.
    """

    name: str
    system: str = ""
    user: str = SLOT
    file: bool = False

    @property
    def version(self) -> str:
        """A hash of the texts: answers to other words are other answers."""
        # the zero byte keeps system and frame apart
        return hashlib.blake2b(f"{self.system}\0{self.user}".encode(), digest_size=8).hexdigest()

    def frame(self, words: str) -> str:
        """The user's turn; one replacement, so that a ``%s`` in the words stays what it is."""
        return self.user.replace(SLOT, words, 1)

    def apply(self, record: Record) -> Record:
        """The record in this style, its input inside the frame; one with a system text of its own stays as it is."""
        if record.system or self.name == "none":
            return record
        # without a frame prompt and input stay two fields, which the template lays out
        if self.user == SLOT:
            return replace(record, system=self.system)
        return replace(record, prompt=self.frame(record.question), input="", system=self.system,
                       history=tuple((self.frame(words), answer) for words, answer in record.history))


@cache
def _table() -> dict[str, Style]:
    rows = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {name: Style(name, **(row or {})) for name, row in rows.items()}


def style(name: str, file: str | None = None) -> Style:
    """A style by name; with a file, its system text (and frame, where the file has one) instead of the table's.

    Args:
        file: .yaml with ``system`` and ``user``; .json or .jsonl of dialogs, which must all have the same system turn;
            .txt: the system text as it is, every byte of it.

    Raises:
        UserError: unknown name; the style needs a file; the file is missing or has no such text.
    """
    if name not in STYLES:
        raise UserError(f"--prompt_style {name}: not known; allowed: {', '.join(STYLES)}")
    known = _table()[name]
    if file is None:
        if known.file:
            raise UserError(f"--prompt_style {name}: its text is a constant of its authors and not shipped; give a file "
                            "that holds it with --prompt_style_file (.txt, .yaml, or their dialogs as .json or .jsonl)")
        return known
    if name == "none":
        raise UserError(f"--prompt_style_file {file}: belongs to a style; add --prompt_style")
    system, user = _read(Path(file).expanduser(), f"--prompt_style_file {file}")
    return Style(name, system, user or known.user)


def _read(path: Path, flag: str) -> tuple[str, str]:
    """(system text, frame or "") of a file."""
    try:
        # bytes, not text mode: universal newlines would change what must stay exact
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{flag}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}); give a .txt, .yaml, .json or .jsonl file") from None
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        return _from_yaml(text, flag)
    if kind in (".json", ".jsonl"):
        return _from_dialogs(path, flag), ""
    if kind != ".txt":
        raise UserError(f"{flag}: unknown type '{path.suffix}'; allowed: .txt, .yaml, .json, .jsonl")
    if not text.strip():
        raise UserError(f"{flag}: is empty; it must hold the system text")
    return text, ""


def _from_yaml(text: str, flag: str) -> tuple[str, str]:
    try:
        row = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{flag}: not valid YAML ({type(error).__name__})") from None
    if not isinstance(row, dict) or row.keys() - {"system", "user"} or not all(isinstance(v, str) for v in row.values()):
        raise UserError(f"{flag}: needs the keys system and user, each a text")
    user = row.get("user", "")
    # ``frame`` replaces the first one only: a second would reach the model as it stands
    if user and user.count(SLOT) != 1:
        raise UserError(f"{flag}: user must hold {SLOT} once, where the user's words go")
    return row.get("system", ""), user


def _from_dialogs(path: Path, flag: str) -> str:
    systems = {record.system for record in read_dialogs(path, "train", 0)}
    # a style is one text: which of several was meant, nobody can tell
    if len(systems) != 1 or "" in systems:
        what = "no system turn" if systems <= {""} else f"{len(systems)} different system turns"
        raise UserError(f"{flag}: its dialogs have {what}; a style needs one and the same in all of them")
    return systems.pop()
