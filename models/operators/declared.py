"""Parameters that a dataclass declares: what they are called, what values they take, and values out of a command line.

Merging, adapters and realignment have each a table of methods whose rows name a parameter dataclass. What the three have in
common stands here, so that a parameter means, and is refused, the same everywhere. Loads no torch: ``--help`` reads the
tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

#: A value as a flag or a recipe gives it.
Value = float | bool | str
#: (type, lowest, highest) that a parameter takes; None: no bound.
Rule = tuple[type, float | None, float | None]


def number(default: Any, help: str, low: float | None = None, high: float | None = None, each: bool = False,
           choices: tuple[str, ...] = ()) -> Any:
    """Declare a parameter of a dataclass.

    Args:
        default: None: it must be given.
        help: what it is, for a person.
        low, high: range of a number, both included; None: no bound.
        each: whether every input may have its own.
        choices: the words that a word may be; empty: any.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "each": each,
                                                        "choices": choices, "required": default is None})


class Declared:
    """A row of a table of methods: its parameters are the fields of the dataclass ``parameters``."""

    parameters: type

    def fields(self) -> dict[str, dataclasses.Field]:
        """Parameters by the name that recipes and flags use (``lambda``, not ``lambda_``)."""
        return {field.name.rstrip("_"): field for field in dataclasses.fields(self.parameters)}

    def rule(self, name: str) -> Rule:
        """(type, lowest, highest) of a parameter."""
        field = self.fields()[name]
        # a default says the type; None stands for a number to be given, which is never a whole one
        kind = type(field.default) if isinstance(field.default, bool | str | int) else float
        return kind, field.metadata["low"], field.metadata["high"]

    def missing(self, given: Iterable[str]) -> list[str]:
        """Parameters that must be given and are not among ``given``, by the name that flags use."""
        return [name for name, field in self.fields().items() if _required(field) and name not in given]

    def checked(self, name: str, value: Value) -> Value:
        """A parameter's value as given on a command line, if it has the type, range and spelling that the row asks for.

        Raises:
            ValueError: it has not; says what would.
        """
        kind, low, high = self.rule(name)
        # bool passes for a number in Python, and NaN for one in any range
        if kind in (float, int) and (isinstance(value, bool | str) or value != value):
            raise ValueError(f"{value} is not a number")
        if kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"{value} is not {'true or false' if kind is bool else 'a word'}")
        if kind is int and not float(value).is_integer():
            raise ValueError(f"{value} is not a whole number")
        if kind in (float, int) and not isinstance(value, str) and not (
                (low is None or value >= low) and (high is None or value <= high)):
            raise ValueError(f"{value} is out of range; allowed: {low} to {high}")
        choices = self.fields()[name].metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{value} is not known; allowed: {', '.join(choices)}")
        return int(value) if kind is int else value


def _required(field: dataclasses.Field) -> bool:
    """Of a ``number`` without a default, or a plain field without one."""
    return field.metadata.get("required", field.default is dataclasses.MISSING)


def scalar(word: str) -> Value:
    """A value as it was written on a command line."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return float(word)
    except ValueError:
        return word


def assignments(text: str) -> Iterator[tuple[str, str, str]]:
    """(as written, name, value) of "name=value; name=value"; the name is empty where there is no ``=``."""
    for written in filter(None, (word.strip() for word in text.split(";"))):
        name, equals, value = (word.strip() for word in written.partition("="))
        yield written, name if equals else "", value
