"""Curves below the table: a sweep over lambda, or any score along any axis, e.g. refusal over steps of harmful tuning.

A file of curves is JSON: {"title", "x": {"title"}, "y": {"title", "higher_is_better"}, "lines": [{"label", "points":
[{"x", "value", "low", "high"}]}], "notes": [sentences]}; low and high may be null, notes may be missing. A report of
scripts/sweep.py is read as three of these: non-refusal, compliance and likelihood over lambda; with refusal by likelihood
as a fourth, its AUC.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from evaluator.reporting.formats import interval
from evaluator.reporting.html.elements import Html, section, tag
from evaluator.reporting.sweeps.files import read_report
from evaluator.statistics.score_files import is_number

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BELOW = 560, 300, 52, 130, 12, 44
_SWEPT = {"non_refusal": "non-refusal of harmful prompts ↓", "compliance": "compliance with harmless prompts ↑",
          "nll": "NLL of the task ↓", "refusal_auc": "AUC of refusal by likelihood ↑"}


@dataclass(frozen=True)
class Point:
    """Of a line; an end that is not known is NaN."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """Lines over one axis: label -> its points."""

    title: str
    across: str
    up: str
    lines: dict[str, list[Point]]
    notes: tuple[str, ...] = ()


def curves_section(files: Sequence[str]) -> Html | None:
    """The pictures of all files, each with its numbers as a table in a fold; None without files.

    Raises:
        UserError: a file is missing or has another shape.
    """
    found = [curves for name in files for curves in read_curves(Path(name).expanduser())]
    return section("curves", "Curves", tag("div", *map(_figure, found), class_="maps"),
                   says="Bars: 95 % intervals.") if found else None


def read_curves(path: Path) -> list[Curves]:
    """A file's curves.

    Raises:
        UserError: it is missing or has another shape; names what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--curves {path}: no such file; name a file of curves, or a report of scripts/sweep.py") from None
    except (ValueError, RecursionError):
        raise UserError(f"--curves {path}: not valid JSON; write the curves again") from None
    if isinstance(content, dict) and "cliff" in content:
        return _sweep(path)
    lines = content.get("lines") if isinstance(content, dict) else None
    axes = [content.get(name) if lines else None for name in ("x", "y")]
    if not (isinstance(lines, list) and all(isinstance(axis, dict) and isinstance(axis.get("title"), str) for axis in axes)
            and all(map(_is_line, lines))):
        raise UserError(f"--curves {path}: not a file of curves; needed: x and y with a title each, lines of label and "
                        "points of x, value, low, high, as docs/howto/compare-models.md shows")
    across, up = (axis["title"] for axis in axes)
    arrow = {True: " ↑", False: " ↓"}.get(axes[1].get("higher_is_better"), "")
    return [Curves(str(content.get("title", path.stem)), across, up + arrow,
                   {line["label"]: [_point(p["x"], p) for p in line["points"]] for line in lines},
                   tuple(map(str, content.get("notes", ()))))]


def _is_line(line: Any) -> bool:
    return (isinstance(line, dict) and isinstance(line.get("label"), str) and isinstance(line.get("points"), list)
            and all(isinstance(p, dict) and is_number(p.get("x")) and is_number(p.get("value"))
                    and all(p.get(end) is None or is_number(p[end]) for end in ("low", "high")) for p in line["points"]))


def _point(x: float, score: Mapping[str, Any]) -> Point:
    low, high = (math.nan if score.get(end) is None else score[end] for end in ("low", "high"))
    return Point(x, score["value"], low, high)


def _sweep(path: Path) -> list[Curves]:
    found = read_report(path)
    half, curves = found["cliff"]["half"], []
    notes = (f"Non-refusal is half of what it was at lambda {half:.4f}.",) if half is not None else ()
    for score, title in _SWEPT.items():
        lines: dict[str, list[Point]] = {}
        for row in found["rows"]:
            if row["weight"] is not None and score in row and row[score]["value"] is not None:
                lines.setdefault(row["group"], []).append(_point(row["weight"], row[score]))
        if lines:
            curves.append(Curves(f"{path.stem}: {found['task']} with {found['safety']}", "lambda", title, lines, notes))
    return curves


def _figure(curves: Curves) -> Html:
    head = tag("tr", *(tag("th", text, scope="col") for text in ("line", curves.across, curves.up)))
    body = [tag("tr", tag("th", label, scope="row"), tag("td", f"{p.x:g}", class_="num"),
                tag("td", f"{p.value:.3f}", interval(p.low, p.high), class_="num"))
            for label, points in curves.lines.items() for p in points]
    return tag("figure", tag("figcaption", tag("b", curves.title), tag("small", curves.up)),
               tag("div", _picture(curves), class_="scroll"),
               *(tag("p", note, class_="says") for note in curves.notes),
               tag("details", tag("summary", "numbers"),
                   tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")))


def _picture(curves: Curves) -> Html:
    points = [p for line in curves.lines.values() for p in line]
    xs = _ends([p.x for p in points])
    ys = _ends([v for p in points for v in (p.value, p.low, p.high) if not math.isnan(v)])

    def place(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (_WIDE - _LEFT - _RIGHT) * (x - xs[0]) / (xs[1] - xs[0]),
                _HIGH - _BELOW - (_HIGH - _TOP - _BELOW) * (y - ys[0]) / (ys[1] - ys[0]))

    parts = []
    for tick in ticks(*ys):
        y = place(xs[0], tick)[1]
        parts += [tag("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"),
                  tag("text", f"{tick:g}", x=_LEFT - 8, y=f"{y + 4:.1f}", text_anchor="end")]
    for tick in ticks(*xs):
        parts.append(tag("text", f"{tick:g}", x=f"{place(tick, ys[0])[0]:.1f}", y=_HIGH - _BELOW + 18, text_anchor="middle"))
    parts.append(tag("text", curves.across, x=(_LEFT + _WIDE - _RIGHT) / 2, y=_HIGH - 6, text_anchor="middle"))
    lines = {label: sorted(line, key=lambda p: p.x) for label, line in curves.lines.items() if line}
    names = _apart({label: place(line[-1].x, line[-1].value)[1] for label, line in lines.items()})
    for at, label in enumerate(curves.lines):
        if label in lines:
            parts.append(_line(label, lines[label], at, place, names[label]))
    return tag("svg", *parts, class_="plot", width=_WIDE, height=_HIGH, viewBox=f"0 0 {_WIDE} {_HIGH}", role="img",
               aria_label=f"{curves.title}: {curves.up} over {curves.across}; its numbers stand below")


def _apart(ends: Mapping[str, float]) -> dict[str, float]:
    """Heights for the names of lines that end at these: in the lines' own order, no two closer than a name is high."""
    found: dict[str, float] = {}
    for label in sorted(ends, key=lambda name: ends[name]):
        found[label] = max([ends[label], *(other + 14 for other in found.values())])
    # what the lowest is pushed below the picture, it and those above it go up again
    floor = float(_HIGH - _BELOW)
    for label in reversed(found):
        found[label] = min(found[label], floor)
        floor = found[label] - 14
    return found


def _line(label: str, points: Sequence[Point], at: int, place: Any, height: float) -> Html:
    """A line with its bars, and its name beside its end at this height."""
    spots = [place(p.x, p.value) for p in points]
    parts = [tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots), class_="curve")]
    for p, (x, y) in zip(points, spots, strict=True):
        if not math.isnan(p.low) and not math.isnan(p.high):
            low, high = place(p.x, p.low)[1], place(p.x, p.high)[1]
            parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{low:.1f}", y2=f"{high:.1f}", class_="whisker"))
        parts.append(tag("circle", tag("title", f"{label}, {p.x:g}: {p.value:.3f}"), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5))
    parts.append(tag("text", label if len(label) <= 20 else f"{label[:18]}…", x=_WIDE - _RIGHT + 8, y=f"{height + 4:.1f}"))
    return tag("g", *parts, class_=f"k{at % 8}")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.04 or 0.5
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between two ends."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 8)
    first = math.ceil(low / step)
    return [round(step * (first + i), 10) for i in range(int(math.floor(high / step)) - first + 1)]
