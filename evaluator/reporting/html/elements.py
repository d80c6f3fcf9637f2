"""HTML out of Python values: what is not made here is text, and is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from data import escaped

#: Elements without an end tag.
_VOID = ("br", "img", "input", "meta", "circle", "line", "path", "rect")


class Html(str):
    """Text that is HTML already: made by ``tag``, or written in this package."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children and values that are no ``Html`` are text; a None, or a False attribute, is left out.

    Args:
        attributes: ``class_`` is class, ``data_row`` is data-row; True stands without a value.
    """
    shown = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
                    if value is not None and value is not False)
    if name in _VOID and not children:
        return Html(f"<{name}{shown}>" if name in _VOID[:4] else f"<{name}{shown}/>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after the other; lists among them are laid flat."""
    return Html("".join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    return join(child) if isinstance(child, list | tuple) else escaped.html(str(child))


def _attribute(name: str, value: Any) -> str:
    return f" {name}" if value is True else f' {name}="{value if isinstance(value, Html) else escaped.html(str(value))}"'


def section(id: str, title: str, *children: Any, says: Any = None) -> Html:
    """A part of the page with its heading; ``says``: a sentence below it."""
    return tag("section", tag("h2", title, id=f"{id}-title"), tag("p", says, class_="says") if says else None, *children,
               id=id, aria_labelledby=f"{id}-title")


def data_block(id: str, content: Any) -> Html:
    """Data for the page's script. Every "<" is escaped: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" stands within strings only; U+2028 and U+2029 end a line for some readers
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Html(text), type="application/json", id=id)


def digest(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def words(markdown: str) -> str:
    """A sentence of a Markdown report as plain text: its escapes taken off."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)
