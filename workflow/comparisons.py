"""The comparisons that a table of arms declares, as the file that ``evaluator/report.py --declared`` reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

_KEYS = {"title", "rows", "but", "against", "scores", "every"}
_NEEDED = ("title", "rows", "against", "scores")


class Arm(Protocol):
    """What is asked of an arm here (``plan.Arm``, which reads its comparisons through this file)."""

    @property
    def label(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def shown(self) -> bool: ...


def problems(content: Any, arms: Mapping[str, Arm], kinds: Collection[str], file: str) -> list[str]:
    """What is wrong with the entry ``comparisons`` of a table, a sentence each."""
    if not isinstance(content, list):
        return [f"{file}: comparisons: needs a list of {{{', '.join(_NEEDED)}}}"]
    found = []
    for at, item in enumerate(content, 1):
        where, body = f"{file}: comparisons, entry {at}", item if isinstance(item, dict) else {}
        found += [f"{where}: {key}: unknown; allowed: {', '.join(sorted(_KEYS))}" for key in body.keys() - _KEYS]
        found += [f"{where}: needs {key}" for key in _NEEDED if not body.get(key)]
        found += [f"{where}: {key}: {name}: no arm and no kind of arms" for key in ("rows", "but", "against")
                  for name in body.get(key) or () if name not in arms and name not in kinds]
    return found


def resolved(content: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], names: Collection[str]) -> list[dict[str, Any]]:
    """The groups with labels instead of arms and kinds; what is not among ``names`` (arms of the report) is left out.

    A group without a row, or without a row to compare with, is left out whole.
    """
    def labels(words: Sequence[str], but: Sequence[str] = ()) -> list[str]:
        return [arm.label for name, arm in arms.items() if arm.shown and name in names and name not in but
                and (name in words or arm.kind in words)]

    groups = [{"title": item["title"], "rows": labels(item["rows"], item.get("but") or ()),
               "against": labels(item["against"]), "scores": list(item["scores"]), "every": bool(item.get("every"))}
              for item in content]
    return [group for group in groups if group["rows"] and group["against"]]
