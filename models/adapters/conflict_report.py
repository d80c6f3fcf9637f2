"""The conflict report: conflicts.json, a table in Markdown, and a heat-map when there is something to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from manifest import write_json
from models.adapters.conflict_figure import draw
from models.adapters.conflicts import SIGN_ROWS, Conflict, summary

JSON, TABLE, PICTURE = "conflicts.json", "conflicts.md", "conflicts.png"


def write_report(conflicts: Sequence[Conflict], folder: Path) -> None:
    """Write conflicts.json, conflicts.md and, when there is something to draw, conflicts.png into ``folder``."""
    total = summary(conflicts)
    write_json(folder / JSON, {"sign_rows": SIGN_ROWS, "pairs": [_plain(c) for c in total],
                               "modules": [_plain(c) for c in conflicts]})
    text = ["# Conflicts before fusion", "",
            "cosine: -1 opposed, 0 independent. overlap: of what both write to (in: read), 1 the same space. sign: share of "
            f"opposite signs, 0.5 for independent changes (up to {SIGN_ROWS} rows of each module).", "",
            *_table(total), "", *_table(conflicts)]
    if not conflicts:
        text = [*text[:3], "The adapters share no module: nothing to conflict."]
    (folder / TABLE).write_text("\n".join(text) + "\n", encoding="utf-8")
    if conflicts:
        draw(conflicts, folder / PICTURE)


def _plain(conflict: Conflict) -> dict:
    # JSON has no infinity, and Python would write one that other readers refuse
    return {k: (None if v == math.inf else v) for k, v in asdict(conflict).items()}


def _table(conflicts: Sequence[Conflict]) -> list[str]:
    names = [f.name for f in fields(Conflict) if f.name not in ("norm_one", "norm_two")]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |",
             "|---" * 3 + "|---:" * (len(names) - 3) + "|"]
    for c in conflicts:
        cells = (getattr(c, name) for name in names)
        lines.append("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells) + " |")
    return lines
