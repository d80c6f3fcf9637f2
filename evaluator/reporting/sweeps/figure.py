"""The picture of a sweep: non-refusal, compliance and the AUC over lambda on the left, the front on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator.reporting import figures
from evaluator.reporting.sweeps.discrimination import AUC

#: Group -> colour, marker; colour-blind safe, apart in grey.
_LOOK = {"fusion": ("#0072B2", "o"), "shrink": ("#E69F00", "s"), "random": ("#999999", "^"), "reverse": ("#56B4E9", "D"),
         "control": ("#000000", "X")}


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """Draw a summary of ``evaluator.reporting.sweep_report`` and save it as PNG."""
    plt = figures._pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.2), layout="constrained")
    # titles of the axes, not of the figure: labels freeze the layout before a figure's title would get its place
    left.set_title(figures.shown(f"{found['task']} and {found['safety']}, prompts in the style {found['style']}", 90),
                   fontsize=10)
    right.set_title("non-refusal against compliance", fontsize=10)
    _over_weight(left, found)
    _front(figure, right, found)
    return figures._save(plt, figure, path)


def _over_weight(axis: Any, found: Mapping[str, Any]) -> None:
    for group, (colour, marker) in _LOOK.items():
        # a reversed order is one point at one lambda, no line
        rows = sorted((r for r in found["rows"] if r["group"] == group and r["weight"] is not None and group != "reverse"),
                      key=lambda r: r["weight"])
        for name, line, filled in (("non_refusal", "-", True), ("compliance", "--", False)):
            if rows:
                axis.errorbar([r["weight"] for r in rows], [r[name]["value"] for r in rows], yerr=_bars(rows, name),
                              color=colour, marker=marker, linestyle=line, capsize=2, linewidth=1.4, elinewidth=0.8,
                              markerfacecolor=colour if filled else "white", label=f"{group}: {name.replace('_', '-')}")
    # fusion's alone: the axis has two lines of every group already
    told = sorted((r for r in found["rows"] if r["group"] == "fusion" and (r.get(AUC) or {}).get("value") is not None),
                  key=lambda r: r["weight"])
    if told:
        axis.errorbar([r["weight"] for r in told], [r[AUC]["value"] for r in told], yerr=_bars(told, AUC), color="#009E73",
                      marker="v", linestyle="-.", capsize=2, linewidth=1.4, elinewidth=0.8, label="fusion: AUC of refusal")
    at = found["cliff"]
    if at["half"] is not None:
        if at["low"] is not None:
            axis.axvspan(max(at["low"], 0), at["high"], color="#D55E00", alpha=0.15, linewidth=0)
        axis.axvline(at["half"], color="#D55E00", linewidth=1, label="half of the non-refusal")
    axis.set_xlabel("lambda, share of the safety adapter")
    axis.set_ylabel("share of prompts, AUC" if told else "share of prompts")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(color="0.93")
    axis.legend(fontsize=7.5, loc="best")


def _front(figure: Any, axis: Any, found: Mapping[str, Any]) -> None:
    rows = [r for r in found["rows"] if r["non_refusal"]["value"] is not None and r["compliance"]["value"] is not None]
    levels = [r["nll"]["value"] for r in rows if r["nll"]["value"] is not None]
    low, high = (min(levels), max(levels)) if levels else (0.0, 1.0)
    dots = None
    for group, (colour, marker) in _LOOK.items():
        mine = [r for r in rows if r["group"] == group]
        if not mine:
            continue
        xs, ys = [r["non_refusal"]["value"] for r in mine], [r["compliance"]["value"] for r in mine]
        axis.errorbar(xs, ys, xerr=_bars(mine, "non_refusal"), yerr=_bars(mine, "compliance"), fmt="none", ecolor="0.82",
                      elinewidth=0.8, zorder=1)
        shades = [r["nll"]["value"] for r in mine]
        if levels and None not in shades:
            # vmax a little above vmin: one level alone would be no range of colours
            dots = axis.scatter(xs, ys, c=shades, cmap="viridis_r", vmin=low, vmax=max(high, low + 1e-9), marker=marker,
                                s=55, edgecolors=colour, linewidths=1.2, zorder=3, label=group)
        else:
            axis.scatter(xs, ys, color=colour, marker=marker, s=55, zorder=3, label=group)
    best = sorted((r for r in rows if r["front"]), key=lambda r: (r["non_refusal"]["value"], r["compliance"]["value"]))
    if len(best) > 1:
        axis.plot([r["non_refusal"]["value"] for r in best], [r["compliance"]["value"] for r in best], color="0.4",
                  linewidth=1, linestyle=":", zorder=2, label="front")
    if dots is not None:
        figure.colorbar(dots, ax=axis, label=figures.shown(f"{found['utility']} NLL (lower is better)"))
    axis.set_xlabel("non-refusal of harmful prompts (lower is better)")
    axis.set_ylabel("compliance with harmless prompts (higher is better)")
    axis.margins(0.1)
    axis.grid(color="0.93", zorder=0)
    axis.legend(fontsize=7.5, loc="lower right")
    shown: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["group"] in ("fusion", "control"):
            # points at one place share a label: a dozen over each other cannot be read (docs/lab-log.md)
            shown.setdefault((round(row["non_refusal"]["value"], 3), round(row["compliance"]["value"], 3)), []).append(row)
    points = [{"label": _named(here), "x": x, "y": y} for (x, y), here in shown.items()]
    if points:
        figures._label(figure, axis, points)


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    """One label for the rows at one place: the lambdas as a range, controls without what stands in brackets, two at most."""
    weights = sorted(r["weight"] for r in rows if r["group"] == "fusion")
    names = [r["label"].partition(" (")[0] for r in rows if r["group"] != "fusion"]
    parts = [f"{weights[0]:g} to {weights[-1]:g}" if len(weights) > 1 else f"{weights[0]:g}"] if weights else []
    parts += names if len(parts) + len(names) <= 2 else [f"{len(names)} controls"]
    return ", ".join(parts)


def _bars(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Lengths below and above; none where there is no interval."""
    pairs = [(r[name]["value"], r[name]["low"], r[name]["high"]) for r in rows]
    return [[max(0.0, value - low) if low is not None else 0.0 for value, low, _ in pairs],
            [max(0.0, high - value) if high is not None else 0.0 for value, _, high in pairs]]
