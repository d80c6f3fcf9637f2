"""What models and strangers wrote, put into tables and pages: text there, never a formula, a tag or a command.

Harmless text comes out unchanged. Each output has one function here; a new format takes its own from this file.
"""

from __future__ import annotations

import html as _html
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Columns of the CSV that inference.py writes, as pandas writes a frame with its index.
ANSWER_COLUMNS = ("", "prompts", "outputs")
#: What a spreadsheet takes for a formula (OWASP, CSV injection), in full-width and small forms too; behind the apostrophes
#: of ours.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b]")
#: Marks that turn the direction of writing, characters without a shape, and those that a terminal obeys: what is read would
#: not be what is there. The joiners that Hindi and Persian need stay.
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c\u00ad\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f"
                      "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
#: What a Markdown reader takes for formatting only where there are two: emphasis, strike-through, formulas.
_PAIRED = re.compile(r"[*$]|~~")
#: A heading, quotation, list or fence at the start of a line.
_BLOCK = re.compile(r"#{1,6}(?=\s|$)|[-+*](?=\s|$)|>|\d{1,9}(?=[.)](\s|$))|~~~|=+$|-+$")
_LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
          "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "|": r"\textbar{}",
          "<": r"\textless{}", ">": r"\textgreater{}",
          # of our own titles: pdflatex knows no such letters
          "\u2191": r"$\uparrow$", "\u2193": r"$\downarrow$", "\u2212": r"$-$", "\u00d7": r"$\times$",
          "\u03bb": r"$\lambda$", "\u03b3": r"$\gamma$"}


def csv_cell(value: Any) -> Any:
    """A cell that a spreadsheet shows as it is: an apostrophe before what would be a formula. Numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def read_cell(text: str) -> str:
    """What ``csv_cell`` was given: the inverse for every text."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def read_answers(rows: Iterable[Mapping[Any, Any]]) -> list[dict[Any, Any]]:
    """Rows of a table as they were before ``csv_cell``, where its columns are those of inference.py; others as they are.

    Columns that somebody added are left as they are: labels beside answers, say.
    """
    return [{key: read_cell(value) if isinstance(value, str) and key in ANSWER_COLUMNS else value
             for key, value in row.items()} if _ours(row) else dict(row) for row in rows]


def _ours(row: Mapping[Any, Any]) -> bool:
    # what pandas calls a column without a name, as it is and as our readers spell it
    return set(ANSWER_COLUMNS) <= {"" if key in ("Unnamed: 0", "unnamed:_0") else key for key in row}


def markdown(text: str) -> str:
    """A table cell or a part of a line: no column, link, picture, code, emphasis or HTML of its own, on one line."""
    text = re.sub(r"\s+", " ", _TURNING.sub("", text))
    # a backslash first: it would undo the one before a bar
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~])", r"\\\\", text)
    text = re.sub(r"[|`]", r"\\\g<0>", text)
    if len(_PAIRED.findall(text)) > 1:
        text = re.sub(r"[*$~]", r"\\\g<0>", text)
    # within a word it is a letter: names of runs stay as they are
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    # an entity would be read as the character that it names
    text = re.sub(r"&(?=#?\w+;)", r"\\&", text)
    # "<" begins a tag before a letter and the like; "p < .05" stays
    text = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)
    return re.sub(r"\](?=[(\[:])", r"\\]", text)


def plain(text: str) -> str:
    """Text on one line without marks that are not seen."""
    return re.sub(r"\s+", " ", _TURNING.sub("", text)).strip()


def code(text: str) -> str:
    """A name between backticks, which it may not end."""
    return "`" + plain(text).replace("`", "'") + "`"


def line(text: str) -> str:
    """A line of its own, or an item ("- ..."): the same, and no heading, quotation, list or fence where it begins."""
    head, rest = ("- ", text[2:]) if text.startswith("- ") else ("", text)
    rest = markdown(rest.strip())
    return head + (f"\\{rest}" if (found := _BLOCK.match(rest)) and not found[0].isdigit() else
                   f"{found[0]}\\{rest[found.end():]}" if found else rest)


def html(text: str) -> str:
    """Text of a page or of a quoted attribute."""
    return _html.escape(_TURNING.sub("", text), quote=True)


def latex(text: str) -> str:
    """Text of a LaTeX table: every character that LaTeX acts on is spelt, on one line."""
    return "".join(_LATEX.get(c, c) for c in _TURNING.sub("", " ".join(text.split())))
