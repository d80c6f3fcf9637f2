"""The conflict report as a picture: a row of panels per pair of adapters, layers across, kinds of module down."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from models.adapters.conflicts import Conflict

#: (field, title, colours, centre, least range around or above it): colours span what there is, and noise stays pale.
PANELS = (("cosine", "cosine", "PuOr", 0, 0.1), ("norm_ratio", "log2 norm ratio", "PuOr", 0, 1),
          ("overlap", "output overlap", "cividis", None, 0.1), ("sign", "opposite signs", "PuOr_r", 0.5, 0.05))
_PLACE = re.compile(r"^(?P<before>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<kind>.+)$")


def grid(conflicts: Sequence[Conflict], name: str) -> tuple[np.ndarray, list[str]]:
    """One field of one pair as (kinds, layers), NaN where there is no such module; and the kinds."""
    places = [_place(c.module) for c in conflicts]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    values = np.full((len(kinds), max(layer for layer, _ in places) + 1), np.nan)
    for (layer, kind), conflict in zip(places, conflicts, strict=True):
        values[kinds.index(kind), layer] = getattr(conflict, name)
    return values, kinds


def draw(conflicts: Sequence[Conflict], path: Path) -> None:
    """Draw all pairs into a PNG."""
    pairs = list(dict.fromkeys((c.one, c.two) for c in conflicts))
    kinds, layers = grid(conflicts, "cosine")[0].shape
    figure = Figure(figsize=(4 * max(2.2, min(6, 0.15 * layers + 1.6)), len(pairs) * (0.24 * kinds + 1.1)),
                    layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pairs), len(PANELS), squeeze=False)
    for row, (one, two) in zip(axes, pairs, strict=True):
        own = [c for c in conflicts if (c.one, c.two) == (one, two)]
        for axis, (name, title, colours, centre, least) in zip(row, PANELS, strict=True):
            values, names = grid(own, name)
            if name == "norm_ratio":
                # halved and doubled lie equally far from 0; a zero or infinite norm must not take the whole scale
                values = np.log2(np.clip(values, 1 / 8, 8))
            # symmetric around the centre, whose colour then always means "none"
            reach = max(least, float(np.nanmax(np.abs(values - (centre or 0)))))
            image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0 if centre is None else centre - reach,
                                vmax=(centre or 0) + reach, interpolation="nearest")
            axis.set_title(title if axis is not row[0] else f"{_short(one)} / {_short(two)}: {title}", fontsize=8)
            axis.set_yticks(range(len(names)), names if axis is row[0] else [""] * len(names), fontsize=6)
            axis.set_xticks(range(0, values.shape[1], max(1, math.ceil(values.shape[1] / 8))))
            axis.tick_params(labelsize=6)
            figure.colorbar(image, ax=axis, shrink=0.9).ax.tick_params(labelsize=6)
    figure.supxlabel("layer", fontsize=8)
    figure.savefig(path)


def _place(module: str) -> tuple[int, str]:
    place = _PLACE.match(module)
    return (int(place["layer"]), place["kind"]) if place else (0, module)


def _short(name: str) -> str:
    return Path(name).name
