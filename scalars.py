"""Typed values out of the words of a command line and of YAML."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class Word(str):
    """A bare yes, no, on or off: true or false in YAML 1.1, a text in YAML 1.2."""

    __slots__ = ()


class Yaml(yaml.SafeLoader):
    """Scalars as in YAML 1.2, nested too: 1e-6 is a number, 010 is ten, a date a text; yes, no, on, off are ``Word``."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
        ("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
        ("tag:yaml.org,2002:null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("tag:yaml.org,2002:merge", "<<", "<"),
        ("tag:yaml.org,2002:int", r"[-+]?\d+", "-+0123456789"),
        ("tag:yaml.org,2002:float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
        ("!word", "(?i:yes|no|on|off)", "yYnNoO")):
    Yaml.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))
def _mapping(loader: Yaml, node: yaml.MappingNode) -> dict[Any, Any]:
    # PyYAML keeps the last of two keys and says nothing; what << brings in may be overridden, that is its use
    seen: set[Any] = set()
    for key, _ in node.value:
        if key.tag != "tag:yaml.org,2002:merge":
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands here twice; drop one",
                                                        key.start_mark)
            seen.add(name)
    loader.flatten_mapping(node)
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value}


Yaml.add_constructor("tag:yaml.org,2002:map", _mapping)
Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Yaml.add_constructor("!word", lambda loader, node: Word(node.value))


def words_in(value: Any) -> list[str]:
    """The ``Word``s of a value, however deep in lists and mappings."""
    if isinstance(value, Word):
        return [str(value)]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for item in inner for word in words_in(item)]


def article(kind: type) -> str:
    """What a value of this type is called."""
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")


def cast(kind: type, value: Any) -> Any:
    """A value in a flag's type; a LookupError, TypeError or ValueError where it does not fit."""
    if value is None:
        return None
    # int(True) is 1, and the text of a mapping is no text that anybody meant
    if isinstance(value, bool | dict) and kind is not bool:
        raise TypeError(value)
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if kind is str and isinstance(value, list) and not any(isinstance(item, list | dict | bool | None) for item in value):
        return ",".join(map(str, value))
    if kind is str and isinstance(value, list):
        raise TypeError(value)
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return kind(value)
