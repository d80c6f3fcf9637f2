"""How cost grows along an axis: slopes on doubly logarithmic axes beside the limit's, and the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def with_slopes(axis: str, points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """{"points", "slopes"}: of each name, over the upper half of the axis, where what does not grow counts least.

    Args:
        points: from the smallest up, each with its place under ``axis``; a name may be missing or None at some of them.
    """
    slopes = {}
    for name in names:
        measured = [(point[axis], point[name]) for point in points if point.get(name)]
        upper = measured[len(measured) // 2:] if len(measured) > 2 else measured
        if len(upper) > 1:
            (x, y), (far_x, far_y) = upper[0], upper[-1]
            slopes[name] = math.log(far_y / y) / math.log(far_x / x)
    return {"points": list(points), "slopes": slopes}


def plot(axes: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Sequence[str]], path: Path) -> None:
    """A picture: a column for each axis, a row for each unit.

    Args:
        axes: axis -> what ``with_slopes`` gave; an axis of another panel's places may say them as "axis, and of what".
        rows: the unit -> the names drawn in it; the name "limit" and those that end in " limit" are dotted.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # at most four beside each other: a page shows no more
    across = len(axes) if len(axes) <= 4 else 3
    blocks = [list(axes.items())[i:i + across] for i in range(0, len(axes), across)]
    figure, panels = plt.subplots(len(rows) * len(blocks), across, figsize=(4 * across, 3.2 * len(rows) * len(blocks)),
                                  layout="constrained", squeeze=False)
    for number, (unit, names) in ((i, row) for i in range(len(blocks)) for row in rows.items()):
        line = panels[number * len(rows) + list(rows).index(unit)]
        for panel in line[len(blocks[number]):]:
            panel.set_visible(False)
        for panel, (title, part) in zip(line, blocks[number], strict=False):
            axis = title.partition(",")[0]
            for name in names:
                places = [(point[axis], point[name]) for point in part["points"] if point.get(name)]
                if places:
                    slope = f", slope {part['slopes'][name]:.2f}" if name in part["slopes"] else ""
                    panel.loglog(*zip(*places, strict=True), ":" if name.endswith("limit") else "o-", label=name + slope)
            panel.set(xlabel=title, ylabel=unit if panel is line[0] else "")
            # the places that were measured; a logarithmic axis writes powers of ten between them
            places = [point[axis] for point in part["points"]]
            panel.set_xticks(places, list(map(_short, places)), rotation=45 if len(places) > 6 else 0)
            panel.set_xticks([], minor=True)
            low, high = panel.get_ylim()
            if high < 4 * low:
                # what hardly grows must not look as if it did
                middle = math.sqrt(low * high)
                panel.set_ylim(middle / 2, middle * 2)
            if panel.lines:
                panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _short(place: float) -> str:
    """A number on an axis: 512, 99M, 1.0B."""
    return f"{place / 1e9:.1f}B" if place >= 1e9 else f"{place / 1e6:.0f}M" if place >= 1e6 else f"{place:g}"


def told(axes: Mapping[str, Mapping[str, Any]]) -> str:
    """The slopes, a line for each axis."""
    return "\n".join(f"{axis}: " + ", ".join(f"{name} {slope:.2f}" for name, slope in part["slopes"].items())
                     for axis, part in axes.items())
