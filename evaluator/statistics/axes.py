"""What is compared: the columns of a report as a table, and what is known about one run."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.sets.protocols import task_of
from evaluator.statistics import readings
from flags.base import SKILLS
from flags.judges import ASKED_BY, COMPARING, KNOWN
from flags.utility import BENCHMARKS, PROBES


@dataclass(frozen=True)
class Axis:
    """One column: its score, where its rows lie, and how two runs are compared on them.

    Args:
        kind: ``rate`` (McNemar), ``mean``, ``scale`` (a mean without bounds) or ``ratio`` (paired bootstrap); made of
            ``parts``: ``balance``, ``auc`` (DeLong) and ``threshold`` (paired bootstrap), whose first part holds the harmful
            prompts, ``corrected`` (a rate divided by what its judge tells apart).
        key: name of the value in the rows; ``ratio`` divides by ``tokens``.
        judge: who says so, where the title does not tell.
        of: the axes that it is made from, where it has no rows of its own; of a balance, empty: the first two.
    """

    score: str
    title: str
    command: str
    set: str
    key: str
    kind: str
    higher: bool = True
    judge: str = ""
    of: tuple[Axis, ...] = ()

    @property
    def parts(self) -> tuple[Axis, ...]:
        """The axes that its rows lie in: itself, or those of a balance."""
        return self.of or (AXES[:2] if self.kind == "balance" else (self,))

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
    Axis("overrefusal_incoherent", "incoherent, harmless prompts ↓", _SAFETY, "overrefusal", "incoherent", "rate",
         higher=False),
    *(Axis(f"overrefusal_{kind}", f"over-refusal, {kind} prompts ↓", _SAFETY, "overrefusal", f"refusal_{kind}", "rate",
           higher=False) for kind in ("plain", "edgy")),
)
#: Columns that a report shows when asked for: refusal by likelihood (evaluate_refusal.py). They are endpoints like the main
#: ones, and count in the findings.
DISCRIMINATION = ("refusal_auc", "refusal_auc_plain", "refusal_auc_edgy", "refusal_auc_length", "refusal_at_10",
                  "pairs_ranked")
_REFUSAL = "evaluate_refusal"
_TITLES = {"refusal_auc": "refusal AUC", "refusal_auc_plain": "refusal AUC, plain prompts",
           "refusal_auc_edgy": "refusal AUC, edgy prompts", "refusal_auc_length": "refusal AUC, equal length",
           "refusal_at_10": "refusal at 10 % over-refusal",
           "pairs_ranked": "matched pairs ranked right"}
#: The keyword judge's rates, corrected by its errors on the labelled answers that are kept with the code.
CORRECTED = tuple(Axis(f"{raw.score}_corrected", f"{raw.title[:-2]}, corrected for the judge's errors {raw.title[-1]}",
                       _SAFETY, "", "", "corrected", raw.higher, of=(raw,)) for raw in (SECONDARY[2], AXES[1]))
#: Columns of reports whose runs were put to benchmarks or probes.
UTILITY_AXES = (
    *(Axis(name, f"{name} ↑", f"evaluate_utility.{name}", name, name, "rate") for name in (*BENCHMARKS, *PROBES)),
)


def secondary(axis: Axis) -> bool:
    """Whether it is another, weaker reading of answers that a main column has already."""
    return axis in SECONDARY or axis in CORRECTED or axis.score.split(".")[0] in ("fitted", "fitted-safer")



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
        unread: a sentence on each value that the rows have no number of.
    """

    folder: Path
    scores: dict[str, dict[str, Any]]
    rows: dict[tuple[str, str], dict[str, float]]
    details: dict[str, Any]
    seed: int | None
    prompts: dict[tuple[str, str], str] = field(default_factory=dict)
    origin: dict[str, dict[str, Any]] = field(default_factory=dict)
    categories: dict[tuple[str, str], str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def judge_axes(found: Iterable[Measured]) -> tuple[Axis, ...]:
    """An axis for each score of the judges of --judges (evaluator/scoring/judging.py), paired by (set, id) as all are."""
    axes = []
    for name in dict.fromkeys(name for item in found for name in item.scores):
        judge, set_name, part = [*name.split("."), "", ""][:3]
        # a joint score of two judges is called TRUTH_x_INFO
        parts = [KNOWN[word] for word in judge.split("_x_") if word in KNOWN]
        if not set_name or not parts or part not in ("", "score", "joint"):
            continue
        # a judge's number has bounds of its own; a comparison has ties, so it is a mean and no rate
        kind = "scale" if part == "score" else "mean" if parts[0].question in COMPARING else "rate"
        higher = KNOWN[judge].up(task_of(set_name)) if judge in KNOWN else True
        title = f"{judge}{f' {part}' if part else ''}, {set_name} {'↑' if higher else '↓'}"
        axes.append(Axis(name, title, ASKED_BY[parts[0].question].removesuffix(".py"), set_name,
                         f"{judge}.{part}" if part else judge, kind, higher))
    return tuple(axes)


def refusal_axes(found: Iterable[Measured], wanted: Iterable[str]) -> tuple[Axis, ...]:
    """The axes of refusal by likelihood, on the embedded prompts and on each file of a user's (NAME.refusal_auc).

    Args:
        wanted: of ``DISCRIMINATION``.
    """
    found, wanted = list(found), [name for name in DISCRIMINATION if name in wanted]
    names = dict.fromkeys(name.rpartition(".")[0] for item in found for name in item.scores
                          if name.rpartition(".")[2] in DISCRIMINATION)
    sets = {place for item in found for place, _ in item.rows}
    return tuple(_refusal_axis(name, score, sets) for name in names for score in wanted)


def _refusal_axis(name: str, score: str, sets: Container[str]) -> Axis:
    """One of them; its harmless parts are the sets that some run has rows of."""
    prefix, title = f"{name}." if name else "", _TITLES[score] + (f", {name}" if name else "")
    full = prefix + score
    if score == "pairs_ranked":
        return Axis(full, f"{title} ↑", _REFUSAL, f"{prefix}refusal_matched", score, "rate")
    kind = score.removeprefix("refusal_auc_")
    kinds = (kind,) if kind in ("plain", "edgy") else ("plain", "edgy", "harmless")
    # of prompts of equal length alone: the others do not have this value
    key = "score_equal_length" if kind == "length" else "score"
    places = [f"{prefix}refusal_harmful", *(place for kind in kinds if (place := f"{prefix}refusal_{kind}") in sets)]
    parts = tuple(Axis(full, f"{title} ↑", _REFUSAL, place, key, "scale") for place in places)
    return Axis(full, f"{title} ↑", _REFUSAL, "", "", "threshold" if score == "refusal_at_10" else "auc", of=parts)


def set_axes(found: Iterable[Measured]) -> tuple[Axis, ...]:
    """An axis for each other set that was scored: published sets and attacks (``readings.COLUMNS``), AlpacaEval's win rate.

    The balance of two sets stands behind their own columns; its score is called HARMFUL,HARMLESS.balance.
    """
    origins = {name: item.origin.get(name, {}) for item in found for name in item.scores}
    axes: dict[str, Axis] = {}
    for name, line in origins.items():
        set_name, _, kind = name.partition(".")
        if set_name in KNOWN or kind not in readings.COLUMNS:
            continue
        reading = readings.COLUMNS[kind]
        # the direction is the reading's, whatever a file says
        command, higher = line.get("command", _SAFETY).partition(".")[0], reading.higher
        judge = line.get("details", {}).get("annotator") or reading.judge
        title = f"{reading.title}, {set_name.replace(',', ' − ')} {'↑' if higher else '↓'}"
        axes[name] = Axis(name, title, command, "" if reading.kind == "balance" else set_name, reading.key, reading.kind,
                          higher, judge)
    return tuple(axis if axis.kind != "balance" else replace(axis, of=_balanced(axis.score, axes)) for axis in axes.values()
                 if axis.kind != "balance" or _balanced(axis.score, axes))


def _balanced(score: str, axes: Mapping[str, Axis]) -> tuple[Axis, ...]:
    """The two axes of a balance; () where one of the two sets has no column, or where only one of them was attacked."""
    usual = {axis.set: axis for axis in AXES[:2]}
    harmful, _, harmless = score.removesuffix(".balance").partition(",")
    # prompts in a wrapper against prompts as they are: refusing a wrapper would count as telling harm from no harm
    if harmful.partition("+")[2] != harmless.partition("+")[2]:
        return ()
    parts = (usual.get(harmful) or axes.get(f"{harmful}.safe_refusal"),
             usual.get(harmless) or axes.get(f"{harmless}.overrefusal"))
    return tuple(part for part in parts if part) if all(parts) else ()
