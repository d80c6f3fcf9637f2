"""Heat-maps of what lies in a results folder: router shares of the rows' runs, and trained masks. Drawn, not embedded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluator.reporting.html.elements import Html, section, tag
from models.run_folders import MOE

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.reporting.page import Content

#: Width and height of a cell in pixels; room for a letter of the names at the left, and for the numbers below.
_CELL, _HIGH, _LETTER, _BELOW = 13, 22, 7, 30
#: A page stays small: this many maps of either kind at most.
_MOST = 60


def router_section(content: Content) -> Html | None:
    """The router's mean share of each expert by layer, of the first seed; None where no row's run was observed.

    Reads results/observation/TASK_RUN.npy of inference.py: (layers, experts).
    """
    root, found = content.roots[0], []
    for line in content.lines:
        run = line.run.split("+")[0]
        for path in sorted((root / "observation").glob("*.npy")):
            task = path.stem.removesuffix(f"_{run}")
            if task != path.stem:
                found.append((line, task, path, run))
    if not found:
        return None
    maps = [drawn for line, task, path, run in found[:_MOST] if (drawn := _router(line, task, path, _experts(root, run)))]
    if not maps:
        return None
    says = f"Mean probability that the router gives each expert, layer by layer, on prompts of a set. {_seed(content)}"
    left = f" {len(found) - _MOST} more lie in results/observation." if len(found) > _MOST else ""
    return section("routers", "Router", tag("div", *maps, class_="maps"), says=says + left)


def _seed(content: Content) -> str:
    seed = content.lines[0].found[0].seed
    return f"Seed {seed}." if seed is not None else "The first seed."


def _experts(root: Path, run: str) -> tuple[str, ...]:
    # read here: the reader of fused models would load torch for a list of names
    try:
        found = json.loads((root / "outputs" / run / MOE).read_text(encoding="utf-8"))["experts"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _router(line: Line, task: str, path: Path, experts: Sequence[str]) -> Html | None:
    try:
        shares = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(shares, np.ndarray) or shares.dtype.kind != "f" or shares.ndim != 2 or not np.isfinite(shares).all():
        return None
    names = experts if len(experts) == shares.shape[1] else [f"expert {i}" for i in range(shares.shape[1])]
    means = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares.mean(0), strict=True))
    return heat_map(f"{line.label} on {task} prompts", names, [str(i) for i in range(len(shares))], shares.T.tolist(),
                    f"mean over layers: {means}", (0.0, 1.0))


def mask_section(content: Content) -> Html | None:
    """What each trained mask of the first folder keeps, and how sure it is, by module and layer; None without masks.json.

    Reads results/masks/NAME/masks.json of mask_figures.py.
    """
    runs = {run: line.label for line in content.lines for run in line.run.split("+")}
    maps = []
    for path in sorted(content.roots[0].glob("masks/*/masks.json")):
        for name, facts in _masks(path).items():
            maps += _mask(runs.get(name, name), facts)
    if not maps:
        return None
    return section("masks", "Masks", tag("div", *maps[:_MOST], class_="maps"),
                   says="Share of the task vector that a mask keeps (an untrained one 0.5), and its entropy in bits (an "
                        "untrained one 1), by module and layer.")


def _masks(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["masks"]
        return found if all(isinstance(of["grid"], dict) for of in found.values()) else {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _mask(label: str, facts: Mapping[str, Any]) -> Iterable[Html]:
    grid = facts["grid"]
    layers = sorted({layer for row in grid.values() for layer in row},
                    key=lambda layer: (not layer.isdigit(), layer.zfill(4)))
    for part, title in (("kept", "share kept"), ("entropy", "entropy, bits")):
        values = [[grid[module].get(layer, {}).get(part) for layer in layers] for module in grid]
        whole = facts.get("whole", {}).get(part)
        says = f"whole mask: {whole:.3f}" if isinstance(whole, int | float) else ""
        yield heat_map(f"{label}: {title}", list(grid), layers, values, says, (0.0, 1.0))


def heat_map(title: str, down: Sequence[str], across: Sequence[str], values: Sequence[Sequence[float | None]], says: str,
             ends: tuple[float, float]) -> Html:
    """A map in one hue whose strength is the value: it reads the same without colour, on light and on dark ground.

    Args:
        down, across: names of the rows and the columns of ``values``; None is a hole.
        says: the numbers that a reader who cannot see the map needs.
        ends: values without and with full strength.
    """
    left = 14 + _LETTER * max((len(_short(name)) for name in down), default=0)
    wide, high = left + _CELL * len(across) + 4, _HIGH * len(down) + _BELOW
    parts = []
    for j, (name, row) in enumerate(zip(down, values, strict=True)):
        parts.append(tag("text", _short(name), x=left - 8, y=_HIGH * j + 15, text_anchor="end"))
        for i, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            share = min(max((value - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)
            parts.append(tag("rect", tag("title", f"{across[i]}, {name}: {value:.3f}"), x=left + _CELL * i, y=_HIGH * j + 1,
                             width=_CELL - 1, height=_HIGH - 2, fill_opacity=f"{0.05 + 0.95 * share:.2f}"))
    step = max(1, -(-len(across) // 10))
    parts += [tag("text", across[i], x=left + _CELL * i + _CELL / 2, y=_HIGH * len(down) + 16, text_anchor="middle")
              for i in range(0, len(across), step)]
    picture = tag("svg", *parts, class_="heat", width=wide, height=high, viewBox=f"0 0 {wide} {high}", role="img",
                  aria_label=f"{title}; {says}")
    return tag("figure", tag("figcaption", tag("b", title), tag("small", says)), tag("div", picture, class_="scroll"))


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:19]}..."
