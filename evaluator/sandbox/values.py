"""Python values as JSON and back, so that results cross from the program to its checker as plain data.

What arrives is made of built-in types only: nothing that the program wrote (a ``__eq__`` that is always true, a pickle) runs
on the checker's side.
"""

from __future__ import annotations

import importlib
from collections.abc import ItemsView, Iterator, KeysView
from itertools import islice
from typing import Any

#: Items that are taken from an iterator; an endless one ends here.
MOST_ITEMS = 1_000_000
#: {exact number: its module}, imported only where one arrives: it would double the start of every run.
_EXACT = {"Decimal": "decimal", "Fraction": "fractions"}
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Opaque:
    """Stands for an object of another type: equal to nothing but itself, true or false as the object was."""

    def __init__(self, truth: bool) -> None:
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


def encode(value: Any) -> Any:
    """A value as JSON data; a subclass as its built-in base, an unknown type as its truth alone."""
    if value is None or isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, int):
        # hexadecimal: decimal digits are limited to 4,300
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if type(value).__name__ in _EXACT:
        return ["number", type(value).__name__, str(value)]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    if isinstance(value, (KeysView, ItemsView)):
        # a view equals the set of what it shows
        return ["set", [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, Iterator):
        return ["iterator", [encode(item) for item in islice(value, MOST_ITEMS)]]
    return ["opaque", bool(value)]


def decode(data: Any) -> Any:
    """The value of ``encode``'s data.

    Raises:
        ValueError, TypeError, RecursionError: the data is not of that form.
    """
    if data is None or isinstance(data, (bool, str, float)):
        return data
    if not isinstance(data, list):
        raise ValueError("not a value")
    kind, *rest = data
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item) for item in _items(rest))
    if kind == "dict":
        return {decode(key): decode(item) for key, item in _items(rest)}
    if kind == "iterator":
        return iter([decode(item) for item in _items(rest)])
    if kind == "int":
        return int(rest[0], 16)
    if kind == "complex":
        return complex(*map(float, rest))
    if kind == "bytes":
        return bytes.fromhex(*rest)
    if kind == "number":
        name, text = rest
        return getattr(importlib.import_module(_EXACT[name]), name)(text)
    if kind == "range":
        return range(*rest)
    if kind == "opaque":
        return Opaque(rest[0] is True)
    raise ValueError(f"no kind of value: {kind!r}")


def _items(rest: list[Any]) -> list[Any]:
    (items,) = rest
    if not isinstance(items, list):
        raise ValueError("not a list of items")
    return items
