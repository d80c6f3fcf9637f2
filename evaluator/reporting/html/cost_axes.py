"""What a row costs, as axes of the fronts and, where the report was asked for costs, as columns of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Name -> title, its unit as a number, digits. Less is better but for tokens in a second.
_TITLES: dict[str, tuple[str, float, int]] = {
    "seconds": ("seconds to make ↓", 1, 0), "all_seconds": ("seconds with all that it is made of ↓", 1, 0),
    "memory_mb": ("peak memory, MB ↓", 1, 0), "stored": ("stored beside the base, M ↓", 1e6, 1),
    "active": ("active beside the base, M ↓", 1e6, 1), "tokens_per_second": ("training tokens/s ↑", 1, 0)}
#: The same by the manifests of the runs, where nobody asked the report for costs.
_OF_PARTS = {"all_seconds": "total_seconds", "memory_mb": "peak_memory_mb"}


@dataclass(frozen=True)
class CostAxis:
    """A cost of every row in the unit of its title; None: not known."""

    name: str
    title: str
    values: tuple[float | None, ...]
    digits: int

    @property
    def higher(self) -> bool:
        return self.title.endswith("↑")

    def shown(self, row: int) -> str:
        """A row's value as people read it; empty where it is not known."""
        value = self.values[row]
        return "" if value is None else f"{value:,.{self.digits}f}"


def cost_axes(labels: Sequence[str], parts: Sequence[Sequence[Mapping[str, Any]]],
              more: Mapping[str, Any]) -> list[CostAxis]:
    """The costs that some row has.

    Args:
        labels: of the rows.
        parts: what the rows' manifests say (``run_parts.parts_of``); the mean over runs and seeds counts.
        more: the report beside its table; where it has "costs" (label -> name -> number), they are what counts.
    """
    told = more.get("costs")
    found = []
    for name, (title, unit, digits) in _TITLES.items():
        values = [told.get(label, {}).get(name) for label in labels] if told else \
            [_mean(of, _OF_PARTS[name]) for of in parts] if name in _OF_PARTS else []
        known = tuple(value / unit if isinstance(value, int | float) else None for value in values)
        if any(value is not None for value in known):
            found.append(CostAxis(name, title, known, digits))
    return found


def _mean(parts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [part[name] for part in parts if isinstance(part.get(name), int | float)]
    # of a mean over fewer seeds nobody could see it
    return sum(values) / len(values) if values and len(values) == len(parts) else None
