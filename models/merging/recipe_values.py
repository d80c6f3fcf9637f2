"""Values of a recipe with the line they stand on: YAML to a tree of items, items to parameter settings.

The YAML reader takes plain values only: no tags of its own, no repeated keys, anchors and ``<<`` within a budget of
nodes, so that a recipe from the net can neither run anything nor fill the memory. Loads no torch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, nearest

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 16
#: characters of a key (it is part of every name below it) and of a number (1:1:1:... is one in YAML 1.1)
MAX_WORD = 100
_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_TEXT = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}
_ALL = (None, "*")
_NUMBER = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?"
_TRUTH = {**dict.fromkeys(("1", "true", "on", "t", "y", "yes"), True),
          **dict.fromkeys(("0", "false", "off", "f", "n", "no"), False)}

log = logging.getLogger(__name__)

Scalar = float | int | bool | str
#: name -> (type, lowest, highest); None: no bound
Rule = tuple[type, float | None, float | None]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains ``filter``; None and "*" match every tensor."""

    filter: str | None
    value: Scalar | tuple[float, ...]

    def matches(self, tensor: str) -> bool:
        return self.filter in _ALL or self.filter in tensor


Setting = Scalar | tuple[float, ...] | tuple[Condition, ...]


def value_at(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """A setting's value for one tensor at position t in 0..1 of its slice.

    A list of numbers is a gradient, linear between evenly spaced points; of conditions the first that matches counts
    (mergekit's rules). None: no condition matches.
    """
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Condition):
        return next((value_at(c.value, tensor, t) for c in setting if c.matches(tensor)), None)
    # gradients have a point per anchor, not per layer: layers lie between them
    place = t * (len(setting) - 1)
    low = int(place)
    high, share = min(low + 1, len(setting) - 1), place - low
    return (1 - share) * setting[low] + share * setting[high]


@dataclass(frozen=True)
class Item:
    """A value of the file: a scalar, a list of items or a dict of items; its line (1-based) and its dotted name."""

    value: Any
    line: int
    name: str
    #: it has an anchor, so that it may stand there to be named elsewhere
    anchored: bool = False


@dataclass
class Report:
    """Every problem of one file, with its line; remarks that change nothing are logged."""

    path: Path
    problems: list[tuple[int, str]] = field(default_factory=list)

    def error(self, item: Item, text: str) -> None:
        self.problems.append((item.line, self._sentence(item, text)))

    def note(self, item: Item, text: str) -> None:
        log.warning(self._sentence(item, text))

    def raise_any(self) -> None:
        if self.problems:
            raise UserError(*dict.fromkeys(text for _, text in sorted(self.problems, key=lambda p: p[0])))

    def _sentence(self, item: Item, text: str) -> str:
        return f"{self.path}:{item.line}: " + (f"{item.name}: " if item.name else "") + text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed from a collection, and no tag outside YAML's core is known."""

    composed = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchored: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # counted while composing: aliases of aliases ("billion laughs") expand later, in _Tree, with a count of its own
        self.composed += 1
        if self.composed > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=self.peek_event().start_mark)
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.anchored.add(id(node))
        return node


# YAML 1.1 reads 1e-8 as text; every recipe that writes it means the number
_Loader.add_implicit_resolver(_TAG + "float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str, report: Report) -> Item:
    """The file's tree; what is wrong with single values goes into the report.

    Raises:
        UserError: not one YAML document, or one of more than MAX_NODES values (aliases expanded) or MAX_DEPTH levels.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        if what == "but found another document":
            what += "; write one recipe per file: a later one may take the run of an earlier one as its model"
        raise UserError(f"{report.path}:{mark.line + 1 if mark else 1}: cannot be read as YAML: {what}") from None
    # yaml composes by recursion; MAX_DEPTH is checked after it, when a deep file has failed already
    except RecursionError:
        raise UserError(f"{report.path}: nested deeper than {MAX_DEPTH} levels") from None
    if node is None:
        raise UserError(f"{report.path}: empty; a recipe is a mapping with merge_method (mergekit's) or method (ours)")
    return _Tree(report, loader).item(node, "", node.start_mark.line + 1, 0)


@dataclass
class _Tree:
    report: Report
    loader: _Loader
    left: int = MAX_NODES

    def item(self, node: yaml.Node, name: str, line: int, depth: int) -> Item:
        # every visit counts, so that an alias costs as much as what it stands for
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self.left < 0 else f"{MAX_DEPTH} levels"
            raise UserError(f"{self.report.path}:{line}: more than {limit}, aliases expanded; write it out shorter")
        if isinstance(node, yaml.MappingNode):
            value: Any = self.mapping(node, name, depth)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.item(child, f"{name}[{i}]", child.start_mark.line + 1, depth + 1)
                     for i, child in enumerate(node.value)]
        else:
            return Item(self.scalar(node, Item(None, line, name)), line, name, id(node) in self.loader.anchored)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            self.report.error(Item(None, line, name), f"tag {node.tag}: not supported; plain values only")
        return Item(value, line, name, id(node) in self.loader.anchored)

    def mapping(self, node: yaml.MappingNode, name: str, depth: int) -> dict[str, Item]:
        items: dict[str, Item] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            place = Item(None, line, name)
            if not isinstance(key, yaml.ScalarNode) or len(key.value) > MAX_WORD:
                self.report.error(place, f"a key must be text of {MAX_WORD} characters or less")
            # applied at the end, below: a key of the mapping itself goes before a merged one, wherever it stands
            elif key.tag == _TAG + "merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            # YAML keeps the last of two equal keys without a word; half a recipe would vanish
            elif key.value in items:
                self.report.error(place, f"key '{key.value}' stands twice, first in line {items[key.value].line}; keep one")
            else:
                full = f"{name}.{key.value}" if name else key.value
                items[key.value] = self.item(value, full, line, depth + 1)
        for part in merged:
            item = self.item(part, name, part.start_mark.line + 1, depth + 1)
            if isinstance(item.value, dict):
                items = {**item.value, **items}
            else:
                self.report.error(item, "<< takes a mapping")
        return items

    def scalar(self, node: yaml.Node, place: Item) -> Scalar | None:
        # dates and "=" are text in a recipe: model names look like them
        if node.tag in _TEXT:
            return node.value
        try:
            if node.tag in _CONSTRUCTED:
                if len(node.value) > MAX_WORD:
                    raise ValueError
                return self.loader.construct_object(node)
            self.report.error(place, f"tag {node.tag}: not supported; plain values only")
        except (ValueError, LookupError, OverflowError):
            self.report.error(place, f"{node.value[:40]}: not a value of type {node.tag.removeprefix(_TAG)}")
        return None


def read_setting(item: Item, rule: Rule, report: Report, *, theirs: bool) -> Setting | None:
    """A parameter as written: scalar, gradient, or conditions; None, and a problem reported, when it is none of them.

    Args:
        theirs: a mapping is {filter: text, value: value} (mergekit's), not {text: value} (ours), and quoted text is read
            where a number, or true and false, can be meant.
    """
    if theirs:
        item = _unquoted(item, rule[0])
    value = item.value
    if isinstance(value, dict) and value and not theirs:
        return _conditions([(entry, text, entry) for text, entry in value.items()], rule, report)
    if isinstance(value, dict):
        value = [item]
    if isinstance(value, list) and value and all(isinstance(entry.value, dict) for entry in value):
        return _conditions([(entry, *_filter(entry, report)) for entry in value], rule, report)
    return _plain(item, rule, report)


def _unquoted(item: Item, kind: type) -> Item:
    """The item with texts that stand for a number or a truth value read as such: pydantic does in mergekit's recipes."""
    value = item.value
    if isinstance(value, list):
        value = [_unquoted(entry, kind) for entry in value]
    elif isinstance(value, dict):
        value = {key: entry if key == "filter" else _unquoted(entry, kind) for key, entry in value.items()}
    elif isinstance(value, str) and kind in (float, int) and re.fullmatch(_NUMBER, value.strip()):
        value = float(value)
    elif isinstance(value, str) and kind is bool:
        value = _TRUTH.get(value.strip().lower(), value)
    return replace(item, value=value)


def _filter(entry: Item, report: Report) -> tuple[str | None, Item]:
    keys = entry.value
    for key in keys.keys() - {"filter", "value"}:
        report.error(keys[key], f"unknown key{nearest(key, ('filter', 'value'))}; allowed keys: filter, value")
    given = keys.get("filter", Item(None, entry.line, entry.name))
    if not isinstance(given.value, str | None):
        report.error(given, f"{given.value}: needs text that stands in tensor names; put it in quotes")
    return given.value, keys.get("value", Item(None, entry.line, f"{entry.name}.value"))


def _conditions(entries: list[tuple[Item, str | None, Item]], rule: Rule, report: Report) -> tuple[Condition, ...] | None:
    conditions: list[Condition] = []
    for entry, text, item in entries:
        value = _plain(item, rule, report)
        if any(c.filter in _ALL or (isinstance(text, str) and c.filter in text) for c in conditions):
            report.note(entry, "never used: an earlier filter matches the same tensors")
        conditions.append(Condition(text, 0.0 if value is None else value))
    return tuple(conditions)


def _plain(item: Item, rule: Rule, report: Report) -> Scalar | tuple[float, ...] | None:
    """A scalar or a gradient."""
    if not isinstance(item.value, list):
        return _scalar(item, rule, report)
    if rule[0] is not float:
        report.error(item, f"a layer gradient needs a parameter between whose values one can interpolate; "
                           f"this one takes {_kind(rule)}")
    elif not item.value:
        report.error(item, "an empty list; a layer gradient needs one number or more")
    else:
        points = [_scalar(point, rule, report) for point in item.value]
        numbers = tuple(point for point in points if isinstance(point, float))
        # what is none was reported
        return numbers if len(numbers) == len(points) else None
    return None


def _scalar(item: Item, rule: Rule, report: Report) -> Scalar | None:
    kind, low, high = rule
    try:
        value = _cast(kind, item.value)
    except (TypeError, ValueError, OverflowError):
        quoted = isinstance(item.value, str) and kind is not str and re.fullmatch(r"[-+.\deE]+", item.value)
        report.error(item, f"{shown(item.value)}: needs {_kind(rule)}" + ("; remove the quotes" if quoted else ""))
        return None
    if not isinstance(value, str) and ((low is not None and value < low) or (high is not None and value > high)):
        report.error(item, f"{shown(value)}: out of range; needs {_kind(rule)}")
        return None
    return value


def _cast(kind: type, value: Any) -> Scalar:
    # no number is read from quoted text: '0.5' in quotes is more often a slip than meant
    if kind is str or isinstance(value, str | None):
        if kind is str and isinstance(value, str):
            return value
        raise TypeError(value)
    # public recipes write normalize: 1.0 as well as true
    if kind is bool:
        if value not in (0, 1):
            raise ValueError(value)
        return bool(value)
    # bool is an int to Python; a weight of `yes` must not become 1
    if isinstance(value, bool) or not math.isfinite(value) or (kind is int and value != int(value)):
        raise ValueError(value)
    return kind(value)


def shown(value: Any) -> str:
    """A value as a message names it."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "no value" if value is None else str(value).lower() if isinstance(value, bool) else str(value)[:60]


def _kind(rule: Rule) -> str:
    kind, low, high = rule
    word = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]
    if low is not None and high is not None:
        return f"{word} between {low} and {high}"
    return word + (f" of {low} or more" if low is not None else "") + (f" of {high} or less" if high is not None else "")


@dataclass(frozen=True)
class MethodSpec:
    """What a recipe may say about a method.

    Args:
        parameters: name -> (type, lowest, highest).
        per_input: parameters that every input may have for itself.
        min_inputs, max_inputs: models beside the base.
        needs_base: whether a base must be given.
        takes_base: whether a base, when given, is no ordinary input.
        not_mergekit: parameters that mergekit's method of this name passes over, though others of its methods know them.
    """

    parameters: Mapping[str, Rule]
    per_input: frozenset[str] = frozenset()
    min_inputs: int = 1
    needs_base: bool = False
    max_inputs: int | None = None
    takes_base: bool = True
    not_mergekit: frozenset[str] = frozenset()
