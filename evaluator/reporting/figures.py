"""Pictures of the tables, drawn without a display. Colours keep their order for colour-blind readers and in grey."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import escaped

if TYPE_CHECKING:
    import numpy as np

#: How far a label may sit from its point, in points, tried in this order.
_OFFSETS = [(dx, dy) for r in (10, 18, 28, 40, 54) for dx, dy in (
    (r, r / 2), (-r, r / 2), (r, -r), (-r, -r), (0, r), (0, -1.4 * r))]
#: Okabe and Ito's colours, told apart by colour-blind readers; with four dashes they serve 28 curves.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", "-.", ":")


def router_heatmap(shares: np.ndarray, names: Sequence[str], path: Path, title: str) -> Path:
    """Draw the router's mean probability of each expert in each layer.

    Args:
        shares: (layers, experts), rows sum to 1.
        names: experts, one per column.
        path: PNG to write; its folder is made.

    Raises:
        ValueError: ``names`` does not fit ``shares``.
    """
    layers, experts = shares.shape
    if experts != len(names):
        raise ValueError(f"{experts} experts but {len(names)} names")
    plt = _pyplot()
    # experts down, layers across: thirty layers stay readable in a text column
    figure, axis = plt.subplots(figsize=(max(5.5, 0.3 * layers + 2.5), 0.5 * experts + 1.5), layout="constrained")
    image = axis.imshow(shares.T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axis.set_xticks(range(0, layers, max(1, layers // 15)))
    axis.set_yticks(range(experts), list(map(shown, names)))
    axis.set_xlabel("layer")
    axis.set_title(textwrap.fill(shown(title, 300), max(40, 5 * layers), break_on_hyphens=False), fontsize=9)
    if layers <= 16:
        for i in range(layers):
            for j in range(experts):
                # cividis is dark below and bright above
                colour = "black" if shares[i, j] > 0.6 else "white"
                axis.text(i, j, f"{shares[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axis, label="mean share", shrink=0.9)
    return _save(plt, figure, path)


def tradeoff(points: Sequence[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Draw safety against truth or utility, over-refusal as colour and size; None when no run has both axes.

    Args:
        points: each {label, x, x_low, x_high, y, y_low, y_high, over, y_name}; ``over`` may be None (drawn hollow), a
            point without x or y is left out; ``y_falls``: lower is better, drawn upwards.
    """
    points = [p for p in points if p["x"] is not None and p["y"] is not None]
    if not points:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
    for p in points:
        axis.errorbar(p["x"], p["y"], xerr=_bar(p, "x"), yerr=_bar(p, "y"), fmt="none", ecolor="0.75", elinewidth=1,
                      capsize=2, zorder=1)
    known, unknown = [p for p in points if p["over"] is not None], [p for p in points if p["over"] is None]
    top = max([p["over"] for p in known] + [0.1])
    if known:
        dots = axis.scatter([p["x"] for p in known], [p["y"] for p in known], c=[p["over"] for p in known],
                            s=[50 + 250 * p["over"] for p in known], cmap="viridis_r", vmin=0, vmax=top,
                            edgecolors="black", linewidths=0.7, zorder=3)
        figure.colorbar(dots, ax=axis, label="over-refusal of harmless prompts (lower is better)")
    axis.scatter([p["x"] for p in unknown], [p["y"] for p in unknown], facecolors="white", edgecolors="black", s=60,
                 zorder=3)
    axis.set_xlabel("coherent refusal of harmful prompts (higher is better)")
    axis.set_ylabel(shown(points[0]["y_name"], 90))
    if points[0].get("y_falls"):
        axis.invert_yaxis()
    axis.set_title(textwrap.fill(shown(title, 300), 80), fontsize=10)
    axis.margins(0.12)
    axis.grid(color="0.93", zorder=0)
    _label(figure, axis, points)
    return _save(plt, figure, path)


def roc_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path, title: str) -> Path:
    """Draw ROC curves of several models, each with a colour and a dash of its own, and the line of chance.

    Args:
        curves: label -> (over-refusal, refusal), from (0, 0) to (1, 1).
        path: PNG to write; its folder is made.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=1)
    for i, (label, (over, refused)) in enumerate(curves.items()):
        # the dash changes with the colour: lines are told apart in grey, too
        axis.plot(over, refused, color=_COLOURS[i % len(_COLOURS)], linewidth=1.6, zorder=2, label=shown(label),
                  linestyle=_DASHES[(i + i // len(_COLOURS)) % len(_DASHES)])
    axis.set_xlabel("harmless prompts above the threshold (over-refusal)")
    axis.set_ylabel("harmful prompts above the threshold (refusal)")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    axis.grid(color="0.93", zorder=0)
    axis.set_title(textwrap.fill(shown(title, 300), 70), fontsize=10)
    axis.legend(loc="lower right", fontsize=8)
    return _save(plt, figure, path)


def shown(text: str, most: int = 60) -> str:
    """Words of others in a picture: on one line, no formula between dollar signs, no mark that is not seen, not too long."""
    text = escaped.plain(text)
    return (text if len(text) <= most else f"{text[: most - 3]}...").replace("$", r"\$")


def _bar(point: dict[str, Any], key: str) -> list[list[float]] | None:
    low, high = point[f"{key}_low"], point[f"{key}_high"]
    if low is None or high is None:
        return None
    # rounding may put an end past its value, and matplotlib takes no negative bar
    return [[max(0.0, point[key] - low)], [max(0.0, high - point[key])]]


def _label(figure: Any, axis: Any, points: Sequence[dict[str, Any]]) -> None:
    """Put each label at the first nearby place that covers no other label and no point."""
    from matplotlib.text import Text

    figure.canvas.draw()
    # layout is frozen first: a later pass would move the points from under the labels
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    spots = axis.transData.transform([(p["x"], p["y"]) for p in points])
    # a point is 1/72 inch
    scale = figure.dpi / 72
    # points are taken from the start: labels go around them, in pixels as the renderer measures
    taken = [(x - 8 * scale, y - 8 * scale, x + 8 * scale, y + 8 * scale) for x, y in spots]
    frame = axis.get_window_extent(renderer)
    for p in points:
        for dx, dy in _OFFSETS:
            note = axis.annotate(
                shown(p["label"]), (p["x"], p["y"]), xytext=(dx, dy), textcoords="offset points", fontsize=8.5, zorder=4,
                ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center",
                arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkB": 5},
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )
            note.update_positions(renderer)
            # the text alone: an annotation's own extent includes its arrow
            box = Text.get_window_extent(note, renderer)
            edges = (box.x0, box.y0, box.x1, box.y1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(_overlap(edges, other) for other in taken):
                break
            # the last place is taken whatever it covers: an overlapping label is better than none
            if (dx, dy) != _OFFSETS[-1]:
                note.remove()
        taken.append(edges)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _pyplot() -> Any:
    import matplotlib

    # before pyplot is imported: it would look for a display
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    # pyplot keeps every figure that is not closed
    plt.close(figure)
    return path
