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

    figure, panels = plt.subplots(len(rows), len(axes), figsize=(4 * len(axes), 3.4 * len(rows)), layout="constrained",
                                  squeeze=False)
    for row, (unit, names) in enumerate(rows.items()):
        for panel, (title, part) in zip(panels[row], axes.items(), strict=True):
            axis = title.partition(",")[0]
            for name in names:
                places = [(point[axis], point[name]) for point in part["points"] if point.get(name)]
                if places:
                    slope = f", slope {part['slopes'][name]:.2f}" if name in part["slopes"] else ""
                    panel.loglog(*zip(*places, strict=True), ":" if name.endswith("limit") else "o-", label=name + slope)
            panel.set(xlabel=title, ylabel=unit if panel is panels[row][0] else "")
            if panel.lines:
                panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def told(axes: Mapping[str, Mapping[str, Any]]) -> str:
    """The slopes, a line for each axis."""
    return "\n".join(f"{axis}: " + ", ".join(f"{name} {slope:.2f}" for name, slope in part["slopes"].items())
                     for axis, part in axes.items())
