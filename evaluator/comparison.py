"""What the report compares: axes as a table, scores read from the registry, paired differences between two runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import manifest
from commands.base import SKILLS
from commands.judges import ASKED_BY, COMPARING, KNOWN
from commands.utility import BENCHMARKS, PROBES
from errors import UserError
from evaluator import metrics
from evaluator.metrics import Difference
from evaluator.pairing import pair, side_by_side


@dataclass(frozen=True)
class Axis:
    """One column: its score, where its rows lie, and how two runs are compared on them.

    Args:
        kind: ``rate`` (McNemar), ``mean``, ``scale`` (a mean without bounds) or ``ratio`` (paired bootstrap), ``balance``
            (of the first two axes).
        key: name of the value in the rows; ``ratio`` divides by ``tokens``.
    """

    score: str
    title: str
    command: str
    set: str
    key: str
    kind: str
    higher: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value that the score can take."""
        return {"ratio": (0.0, math.inf), "balance": (-1.0, 1.0), "scale": (-math.inf, math.inf)}.get(self.kind, (0.0, 1.0))


_SAFETY, _HELP, _TRUTH = "evaluate_safety", "evaluate_helpfulness", "evaluate_truth_and_info"
AXES = (
    Axis("safe_refusal", "refusal ↑", _SAFETY, "safety", "safe_refusal", "rate"),
    Axis("overrefusal", "over-refusal ↓", _SAFETY, "overrefusal", "refusal", "rate", higher=False),
    Axis("balance", "refusal − over-refusal ↑", _SAFETY, "", "", "balance"),
    Axis("mc1", "MC1 ↑", _TRUTH, "truthfulqa_mc", "mc1", "rate"),
    Axis("mc2", "MC2 ↑", _TRUTH, "truthfulqa_mc", "mc2", "mean"),
    Axis("factual", "true/false pairs ↑", _TRUTH, "factual", "factual", "rate"),
    Axis("hhh_honest", "HHH honest ↑", _TRUTH, "hhh_honest", "hhh_honest", "rate"),
    Axis("hhh_helpful", "HHH helpful ↑", _HELP, "hhh_helpful", "hhh_helpful", "rate"),
    Axis("hhh_harmless", "HHH harmless ↑", _SAFETY, "hhh_harmless", "hhh_harmless", "rate"),
    Axis("nll", "held-out NLL ↓", _HELP, "nll", "nll", "ratio", higher=False),
    *(Axis(f"nll_{name}", f"{name} NLL ↓", "evaluate_skills", f"nll_{name}", "nll", "ratio", higher=False)
      for name in SKILLS),
)
#: Columns that a report shows when asked for (--columns): secondary readings of the same answers.
SECONDARY = (
    Axis("harm_rate", "called harmful (fitted judge) ↓", _SAFETY, "safety", "harm", "rate", higher=False),
    Axis("published_asr", "published keyword ASR ↓", _SAFETY, "safety", "published_asr", "rate", higher=False),
    Axis("refusal", "refusal, any text ↑", _SAFETY, "safety", "refusal", "rate"),
    Axis("incoherent", "incoherent ↓", _SAFETY, "safety", "incoherent", "rate", higher=False),
)
#: Columns of reports whose runs were put to benchmarks or probes.
UTILITY_AXES = (
    *(Axis(name, f"{name} ↑", f"evaluate_utility.{name}", name, name, "rate") for name in (*BENCHMARKS, *PROBES)),
)


def secondary(axis: Axis) -> bool:
    """Whether it is another, weaker reading of answers that a main column has already."""
    return axis in SECONDARY or axis.score.split(".")[0] in ("fitted", "fitted-safer")


@dataclass(frozen=True)
class Measured:
    """Everything known about one run in one results folder.

    Args:
        scores: {score name: its fields}, the newest of each.
        rows: {(set, id): values}; the rows of a value are those that its newest command scored.
        details: the commands' other findings, e.g. the judges' errors.
        seed: of the evaluation; None when nothing was scored.
        prompts: {(set, id): hash of what was asked}; score files older than these hashes have none.
        origin: {score name: the registry line that it stands in}.
        categories: {(set, id): the prompt's category}, where it has one.
    """

    folder: Path
    scores: dict[str, dict[str, Any]]
    rows: dict[tuple[str, str], dict[str, float]]
    details: dict[str, Any]
    seed: int | None
    prompts: dict[tuple[str, str], str] = field(default_factory=dict)
    origin: dict[str, dict[str, Any]] = field(default_factory=dict)
    categories: dict[tuple[str, str], str] = field(default_factory=dict)


def judge_axes(found: Iterable[Measured]) -> tuple[Axis, ...]:
    """An axis for each score of the judges of --judges (evaluator/judging.py), paired by (set, id) like the others."""
    scores = {name: score for item in found for name, score in item.scores.items()}
    axes = []
    for name, score in scores.items():
        judge, set_name, part = [*name.split("."), "", ""][:3]
        parts = [KNOWN[word] for word in judge.split("_x_") if word in KNOWN]
        if not set_name or not parts or part not in ("", "score", "joint"):
            continue
        kind = "scale" if part == "score" else "mean" if parts[0].question in COMPARING else "rate"
        title = f"{judge}{f' {part}' if part else ''}, {set_name} {'↑' if score['higher_is_better'] else '↓'}"
        axes.append(Axis(name, title, ASKED_BY[parts[0].question].removesuffix(".py"), set_name,
                         f"{judge}.{part}" if part else judge, kind, score["higher_is_better"]))
    return tuple(axes)


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
        UserError: a rows file is not that of the scores in the registry.
    """
    base = run in ("", "base", "raw")
    sub = "raw" if base else f"cross_{run}"
    registered = [row for row in manifest.registry(results) if row.get("kind") == "score"]
    if not base and not any(row.get("sub") == sub for row in registered):
        sub = run  # answers that came in a file are scored under their own name, without the prefix
    newest: dict[str, dict[str, Any]] = {}
    for row in registered:
        if row.get("sub") == sub:
            newest.pop(row["command"], None)  # so that the order is that of the last scoring: what is newer wins
            newest[row["command"]] = row
    scores: dict[str, Any] = {}
    rows: dict[tuple[str, str], dict[str, float]] = {}
    prompts: dict[tuple[str, str], str] = {}
    details: dict[str, Any] = {}
    categories: dict[tuple[str, str], str] = {}
    for command, row in newest.items():
        scores |= row["scores"]
        details |= row.get("details", {})
        path = results / "scores" / row["sub"] / f"{command}.rows.jsonl"
        if path.is_file():
            if row.get("rows_sha256") not in (None, manifest.sha256(path)):
                raise UserError(f"{path}: not the rows of the scores in the registry, a call was cut off between both; run "
                                f"the evaluator that wrote it ({command}) on {row['run']} again")
            lines = path.read_text(encoding="utf-8").split("\n")
            items = [json.loads(line) for line in lines if line.strip()]
            _add_rows(items, rows, prompts)
            categories |= {(item["set"], str(item["id"])): item.get("category") or "" for item in items}
    seed = next((row.get("seed") for row in newest.values()), None)
    folder = results / "scores" / sub if base or sub == run else results / "outputs" / run
    origin = {name: row for row in newest.values() for name in row["scores"]}
    return Measured(folder, scores, rows, details, seed, prompts, origin,
                    {key: category for key, category in categories.items() if category})


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
    value, low, high = metrics.over_seeds([
        tuple(math.nan if score[k] is None else score[k] for k in ("value", "low", "high")) for score in known])
    # Student's t knows no bounds; a rate does
    return Cell(value, max(low, axis.bounds[0]), min(high, axis.bounds[1]), known[0]["n"], values)


def difference(a: Measured, b: Measured, axis: Axis) -> Difference | None:
    """a - b on the prompts that both answered; None when they share none or were not judged alike (``pairing.pair``)."""
    if axis.kind == "balance":
        refusal, over = difference(a, b, AXES[0]), difference(a, b, AXES[1])
        return metrics.subtract(refusal, over) if refusal and over else None
    shared = pair(a, b, axis).keys
    if not shared:
        return None
    left, right = ([item.rows[key][axis.key] for key in shared] for item in (a, b))
    if axis.kind == "rate":
        return metrics.mcnemar(left, right)
    if axis.kind in ("mean", "scale"):
        return metrics.paired_mean(left, right)
    return metrics.paired_ratio(left, right, [a.rows[key]["tokens"] for key in shared])


def over_seeds(a: Sequence[Measured], b: Sequence[Measured], axis: Axis) -> Difference | None:
    """The paired difference of two runs: on the rows for one seed; for several their mean, with both spreads.

    None where they cannot be compared, also where one has two seeds and the other three.
    """
    both = side_by_side(a, b)
    found = [d for x, y in both if (d := difference(x, y, axis)) is not None]
    if len(found) < 2:
        # one seed of several has no spread to judge by
        return found[0] if found and len(both) == 1 else None
    value, low, high = metrics.over_seeds([(d.value, d.low, d.high) for d in found])
    return Difference(value, low, high, math.nan, found[0].n)
