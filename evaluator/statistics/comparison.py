"""Scores read from the registry, and paired differences between two runs on an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import manifest
from data.sets.protocols import task_of
from errors import UserError
from evaluator.statistics import crossed, discrimination, metrics
from evaluator.statistics.axes import Axis, Measured
from evaluator.statistics.corrected import corrected_difference, errors_of
from evaluator.statistics.metrics import Difference
from evaluator.statistics.pairing import pair, side_by_side
from evaluator.statistics.score_files import checked_line, read_rows


@dataclass(frozen=True)
class Cell:
    """A value over seeds with its interval: that of the rows for one seed, of both together for several."""

    value: float
    low: float
    high: float
    n: int
    per_seed: tuple[float | None, ...]


def measured(results: Path, run: str) -> Measured:
    """Read a run's newest scores and their rows; empty where nothing was scored.

    Raises:
        UserError: a rows file is not that of the scores in the registry, or either is none (``score_files``).
    """
    base = run in ("", "base", "raw")
    sub = "raw" if base else f"cross_{run}"
    registered = [row for row in manifest.registry(results) if row.get("kind") == "score"]
    told: dict[str, list[str]] = {}
    if not base and not any(row.get("sub") == sub for row in registered):
        sub = run  # answers that came in a file are scored under their own name, without the prefix
    newest: dict[str, dict[str, Any]] = {}
    for row in registered:
        if row.get("sub") == sub:
            row, unread = checked_line(row, f"{results / manifest.REGISTRY}, {sub}")
            told[row["command"]] = unread
            newest.pop(row["command"], None)  # so that the order is that of the last scoring: what is newer wins
            newest[row["command"]] = row
    scores: dict[str, Any] = {}
    rows: dict[tuple[str, str], dict[str, float]] = {}
    prompts: dict[tuple[str, str], str] = {}
    details: dict[str, Any] = {}
    categories: dict[tuple[str, str], str] = {}
    for command, row in newest.items():
        scores |= _scores(row)
        details |= row.get("details", {})
        path = results / "scores" / row["sub"] / f"{command}.rows.jsonl"
        if path.is_file():
            # a difference from rows of another call would be wrong without a sign of it
            if row.get("rows_sha256") not in (None, manifest.sha256(path)):
                raise UserError(f"{path}: not the rows of the scores in the registry, a call was cut off between both; run "
                                f"the evaluator that wrote it ({command}) on {row['run']} again")
            items, unread = read_rows(path)
            told[command] = told[command] + unread
            _add_rows(items, rows, prompts)
            categories |= {(item["set"], str(item["id"])): item.get("category") or "" for item in items}
    seed = next((row.get("seed") for row in newest.values()), None)
    folder = results / "scores" / sub if base or sub == run else results / "outputs" / run
    origin = {name: row for row in newest.values() for name in _scores(row)}
    return Measured(folder, scores, rows, details, seed, prompts, origin,
                    {key: category for key, category in categories.items() if category},
                    tuple(text for texts in told.values() for text in texts))


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line's scores; the balance of other sets by the names of both, for a set's own name fits several pairs."""
    command, *sets = row["command"].split(".")
    if command != "evaluate_safety" or not 1 <= len(sets) <= 2 or (
            len(sets) == 1 and task_of(sets[0]) not in ("safety", "overrefusal")):
        return row["scores"]
    # the command names the sets that are not the usual ones, the harmful first
    harmful = sets[0] if len(sets) > 1 or task_of(sets[0]) == "safety" else "safety"
    harmless = sets[-1] if len(sets) > 1 or task_of(sets[0]) == "overrefusal" else "overrefusal"
    return {f"{harmful},{harmless}.balance" if name.endswith(".balance") else name: score
            for name, score in row["scores"].items()}


def _add_rows(items: Sequence[dict[str, Any]], rows: dict[tuple[str, str], dict[str, float]],
              prompts: dict[tuple[str, str], str]) -> None:
    """Put a newer command's rows over those of older ones.

    Older rows lose the values that the newer command has for their set: it may have scored other rows of it.
    """
    newer: dict[str, set[str]] = {}
    for item in items:
        newer.setdefault(item["set"], set()).update(item["values"])
    for (name, _), values in rows.items():
        for value in newer.get(name, ()):
            values.pop(value, None)
    for item in items:
        key, asked = (item["set"], str(item["id"])), item.get("prompt_hash")
        before = prompts.pop(key, None)
        if before and asked and before != asked:
            del rows[key]  # what an older command said of other words under this id
        rows.setdefault(key, {}).update(item["values"])
        if asked:
            prompts[key] = asked
    for key in [key for key, values in rows.items() if not values]:
        del rows[key]
        prompts.pop(key, None)


def cell(found: Sequence[Measured], axis: Axis) -> Cell | None:
    """The value of an axis over the seeds that have it; None where none has."""
    scores = [item.scores.get(axis.score) for item in found]
    values = tuple(score["value"] if score else None for score in scores)
    known = [score for score in scores if score and score["value"] is not None]
    if not known:
        return None
    if len(found) > len(known) == 1:  # one seed of several has no spread to judge by
        return Cell(known[0]["value"], math.nan, math.nan, known[0]["n"], values)
    ends = [tuple(math.nan if score[k] is None else score[k] for k in ("value", "low", "high")) for score in known]
    value, low, high = crossed.over_seeds(ends, _shared([item for item in found if axis.score in item.scores], axis))
    # Student's t knows no bounds; a rate does
    return Cell(value, max(low, axis.bounds[0]), min(high, axis.bounds[1]), known[0]["n"], values)


def difference(a: Measured, b: Measured, axis: Axis) -> Difference | None:
    """a - b on the prompts that both answered; None when they share none or were not judged alike (``pairing.pair``)."""
    if axis.kind == "balance":
        # two sets of prompts, so no paired test: each difference with its own interval
        refusal, over = (difference(a, b, part) for part in axis.parts)
        return metrics.subtract(refusal, over) if refusal and over else None
    if axis.kind in ("auc", "threshold"):
        return _told_apart(a, b, axis)
    if axis.kind == "corrected":
        raw, errors = difference(a, b, axis.parts[0]), [errors_of(item, axis.parts[0]) for item in (a, b)]
        # two judges, or labels of other answers: what is left of the difference is not known
        return corrected_difference(raw, errors[0]) if raw and errors[0] and errors[0] == errors[1] else None
    shared = pair(a, b, axis).keys
    if not shared:
        return None
    left, right = ([item.rows[key][axis.key] for key in shared] for item in (a, b))
    if axis.kind == "rate":
        return metrics.mcnemar(left, right)
    if axis.kind in ("mean", "scale"):
        return metrics.paired_mean(left, right, bounds=axis.bounds)
    return metrics.paired_ratio(left, right, [a.rows[key]["tokens"] for key in shared])


def _told_apart(a: Measured, b: Measured, axis: Axis) -> Difference | None:
    """The difference of two AUCs or of two refusal rates at the models' own thresholds, on the prompts that both scored."""
    keys = [pair(a, b, part).keys for part in axis.parts]
    if len(keys) < 2 or not all(keys):
        return None
    harmful, harmless = keys[0], [key for part in keys[1:] for key in part]
    sides = harmful, harmless
    if axis.kind == "threshold":
        # harmless prompts of one half give each model's threshold, harmful ones of the other are read
        sides = tuple([key for key in side if a.rows[key].get("test_half") == half]
                      for half, side in ((0, harmless), (1, harmful)))
        if min(map(len, sides)) < discrimination.LEAST:
            return None
    value = axis.parts[0].key
    first, second = (tuple([item.rows[key][value] for key in side] for side in sides) for item in (a, b))
    return discrimination.delong(first, second) if axis.kind == "auc" else discrimination.paired_refusal_at(first, second)


def over_seeds(a: Sequence[Measured], b: Sequence[Measured], axis: Axis) -> Difference | None:
    """The paired difference of two runs: on the rows for one seed; for several their mean, with both spreads.

    None where they cannot be compared, also where one has two seeds and the other three.
    """
    both = side_by_side(a, b)
    made = [(two, d) for two in both if (d := difference(*two, axis)) is not None]
    differences = [d for _, d in made]
    if len(differences) < 2:
        # one seed of several has no spread to judge by
        return differences[0] if differences and len(both) == 1 else None
    ends = [(d.value, d.low, d.high) for d in differences]
    shared = _shared([x for (x, _), _ in made], axis, [y for (_, y), _ in made])
    value, low, high = crossed.over_seeds(ends, shared)
    return Difference(value, low, high, crossed.p_value(ends, shared), differences[0].n)


def _shared(found: Sequence[Measured], axis: Axis, against: Sequence[Measured] = ()) -> float:
    """How much of the rows' spread is the prompts' own, the same for every seed (``crossed.common_share``).

    1, the widest interval, where seeds share no rows: they were scored on other prompts, or the rows are gone.
    """
    if axis.kind in ("threshold", "corrected"):
        # the doubt about a threshold or a judge is the same for every seed, and rows do not show it
        return 1.0
    tables = _placed_by_seed(found, axis, against) if axis.kind == "auc" else \
        [_rows_by_seed(found, part, against) for part in axis.parts]
    return crossed.common_share(tables) if all(table is not None for table in tables) else 1.0


def _placed_by_seed(found: Sequence[Measured], axis: Axis, against: Sequence[Measured]) -> list[np.ndarray | None]:
    """Tables (seeds, prompts) of harmful and of harmless prompts' placements, whose means are the AUC (``placements``)."""
    keys = [_common(found, part, against) for part in axis.parts]
    if len(keys) < 2 or not all(keys):
        return [None]
    sides = [keys[0], [key for part in keys[1:] for key in part]]

    def placed(items: Sequence[Measured]) -> list[np.ndarray]:
        value = axis.parts[0].key
        both = [discrimination.placements(*([item.rows[key][value] for key in side] for side in sides)) for item in items]
        return [np.array([parts[i] for parts in both]) for i in (0, 1)]

    mine = placed(found)
    return [x - y for x, y in zip(mine, placed(against), strict=True)] if against else mine


def _common(found: Sequence[Measured], axis: Axis, against: Sequence[Measured]) -> list[tuple[str, str]]:
    """The rows of an axis that all seeds have, and all of ``against``."""
    pairs = [pair(x, y, axis).keys for x, y in zip(found, against, strict=True)] if against else \
        [tuple(key for key, values in item.rows.items() if key[0] == axis.set and axis.key in values) for item in found]
    return sorted(set.intersection(*map(set, pairs))) if pairs else []


def _rows_by_seed(found: Sequence[Measured], axis: Axis, against: Sequence[Measured]) -> np.ndarray | None:
    """(seeds, prompts): values, or how far above those of ``against``, on the prompts that all seeds have; None: no such."""
    keys = _common(found, axis, against)
    if not keys:
        return None
    table = np.array([[item.rows[key][axis.key] for key in keys] for item in found], float)
    if against:
        table -= np.array([[item.rows[key][axis.key] for key in keys] for item in against], float)
    if axis.kind == "ratio":
        tokens = np.array([[item.rows[key]["tokens"] for key in keys] for item in found], float)
        # what a row moves sum / sum by, to first order
        table = (table - tokens * table.sum(1, keepdims=True) / tokens.sum(1, keepdims=True)) / tokens.mean(1, keepdims=True)
    return table
