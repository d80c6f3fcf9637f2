"""The common report of several finished sweeps, one per seed: means over seeds, seeds crossed with prompts.

Values and intervals are those of the seeds' own reports; the rows behind them, in each seed's results folder, say how much
of the prompts' spread is the same for every seed (``crossed.common_share``). Where rows are missing, or no longer give the
value of the report, both spreads are added whole: the interval is then too wide and never too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from evaluator.reporting.limits import twice
from evaluator.reporting.sweeps import curve as sweep
from evaluator.reporting.sweeps import discrimination
from evaluator.reporting.sweeps.curve import Point
from evaluator.reporting.sweeps.files import read_report
from evaluator.reporting.sweeps.report import corrected, plain
from evaluator.scoring import answer_scores
from evaluator.statistics import crossed
from evaluator.statistics.comparison import measured

#: Row of a seed's report -> the answers behind it.
Models = Mapping[tuple[str, str], Point]
#: Rows of a report hold six digits, and likelihoods four: what differs by more was scored again since.
_EQUAL = 1e-3


def over_seeds(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """The common report: means with crossed intervals, of the rows that every seed has.

    Raises:
        UserError: a sweep is missing or damaged, they swept different things, or rows are not those of their scores.
    """
    if again := twice("--roots", (str(folder.resolve()) for folder in folders)):
        raise UserError(*again)
    files = [folder / "report" / f"{name}.json" for folder in folders]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(*(f"--roots: {file} does not exist; run scripts/sweep.py --name {name} there" for file in missing))
    # the reports, not the scores: what each seed concluded is what is averaged
    parts = [read_report(file) for file in files]
    keys = ("task", "safety", "form", "style", "utility")
    # a mean over different sweeps would look like any other
    if odd := [key for key in keys if len({part[key] for part in parts}) > 1]:
        raise UserError(f"--roots: these sweeps differ in {', '.join(odd)}; give sweeps of one kind")
    utility = parts[0]["utility"]
    styles = {}
    for style in parts[0]["styles"]:
        if all(style in part["styles"] for part in parts):
            rows = [part["styles"][style] for part in parts]
            answers = [_models(*seed, style) for seed in zip(folders, parts, rows, strict=True)]
            styles[style] = _joined(rows, answers, utility)
    models = [_models(folder, part, part["rows"], part["style"]) for folder, part in zip(folders, parts, strict=True)]
    return {**{key: parts[0][key] for key in keys}, "styles": styles, **joined(parts, models),
            **({"broken_complies": True} if any(part.get("broken_complies") for part in parts) else {})}


def joined(parts: Sequence[Mapping[str, Any]], models: Sequence[Models]) -> dict[str, Any]:
    """What the seeds' reports (``parts``) say together; ``models``: the answers behind them, empty where there are none."""
    shared = set.intersection(*map(set, models))
    return {
        "seed": [part["seed"] for part in parts],
        "crossed": all(found[key].non_refusal for found in models for key in shared),
        "rows": _joined([part["rows"] for part in parts], models, parts[0]["utility"]),
        "cliff": _cliff([part["cliff"] for part in parts]), "compared": _gaps(parts, models),
        **({"compared_auc": corrected(told)} if (told := discrimination.compared_over_seeds(parts, models)) else {}),
    }


def _models(folder: Path, part: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], style: str) -> Models:
    """The answers behind a seed's rows; nothing in them where the rows are gone or an older report names no sets."""
    suffix = "" if style == "none" else f"+{style}"
    harmful, harmless = part.get("sets") or ("", "")
    sets = f"{harmful}{suffix}", f"{harmless}{suffix}"
    found = {run: measured(folder, run) for run in dict.fromkeys(row["run"] for row in rows)} if harmful else {}
    models = {}
    for row in rows:
        weight = math.nan if row["weight"] is None else row["weight"]
        models[row["group"], row["label"]] = sweep.point(
            row["label"], row["run"], weight, found[row["run"]], sets, part["utility"],
            discrimination=discrimination.AUC in row) if found else Point(row["label"], row["run"], weight, {}, {})
    return models


def _share(scores: Sequence[Mapping[str, Any]], models: Sequence[Point],
           values: Callable[[Point], Mapping[str, float]]) -> float:
    """The common share of a score's values by prompt; 1 where a seed's do not give the value of its report."""
    found = [values(model) for model in models]
    fits = all(by and abs(sum(by.values()) / len(by) - score["value"]) < _EQUAL
               for by, score in zip(found, scores, strict=True))
    return crossed.share_of([found]) if fits else 1.0


def _likelihood(model: Point) -> dict[str, float]:
    """What each row moves the likelihood per token by, to first order, above that likelihood."""
    if not model.utility:
        return {}
    tokens = sum(count for _, count in model.utility.values())
    ratio = sum(nll for nll, _ in model.utility.values()) / tokens
    mean = tokens / len(model.utility)
    return {id: ratio + (nll - ratio * count) / mean for id, (nll, count) in model.utility.items()}


def _values_of(name: str, utility: str) -> Callable[[Point], Mapping[str, float]]:
    if name in ("non_refusal", "compliance"):
        return lambda model: model.non_refusal if name == "non_refusal" else model.comply
    if name == "broken":
        return lambda model: model.broken
    if name == "nll":
        return _likelihood
    key = answer_scores.measures(utility)[name].key
    return lambda model: model.answers.get(key, {})


def _joined(parts: Sequence[Sequence[Mapping[str, Any]]], models: Sequence[Models], utility: str) -> list[dict[str, Any]]:
    """The rows that every part has."""
    # scores that only some sweeps have
    names = answer_scores.measures(utility)
    by_key = [{(row["group"], row["label"]): row for row in rows} for rows in parts]
    kept = []
    for key, row in by_key[0].items():
        rows = [found[key] for found in by_key if key in found]
        # sweeps refine at lambdas of their own: only what all seeds have can be averaged
        if len(rows) < len(parts):
            continue
        mine = [found[key] for found in models]
        scores = {}
        some = [name for name in ("broken", *names) if all(name in r for r in rows)]
        for name in ("non_refusal", "compliance", "nll", *some):
            found = [r[name] for r in rows]
            if None in [score["value"] for score in found]:
                scores[name] = dict.fromkeys(("value", "low", "high"), None) | {"n": row[name]["n"]}
                continue
            value, low, high = _over_seeds(found, _share(found, mine, _values_of(name, utility)))
            # Student's t knows no bounds: shares are cut at theirs, a likelihood has none
            ends = (low, high) if name == "nll" else (max(0.0, low), min(1.0, high))
            scores[name] = plain({"value": value, "low": ends[0], "high": ends[1]}) | {"n": row[name]["n"]}
        for name in (name for name in discrimination.TITLES
                     if all(name in r and r[name]["value"] is not None for r in rows)):
            scores[name] = plain(discrimination.score_over_seeds(name, [r[name] for r in rows], mine)) | {
                "n": row[name]["n"]}
        by_name = {"judged": lambda name: lambda model: model.judged.get(name, {}),
                   "by_category": lambda name: lambda model: {id: value for id, value in model.non_refusal.items()
                                                              if model.category.get(id) == name},
                   # rows of a benchmark are not read here: both spreads whole
                   "benchmarks": lambda name: lambda model: {}}
        kept.append({k: row[k] for k in ("label", "run", "group", "weight")} | scores | {
            # on the front in every seed: one lucky seed makes no front
            "front": all(r.get("front") for r in rows),
            **{part: _each_over_seeds([r.get(part, {}) for r in rows], mine, values) for part, values in by_name.items()}})
    return kept


def _each_over_seeds(rows: Sequence[Mapping[str, Any]], models: Sequence[Point],
                     values: Callable[[str], Callable[[Point], Mapping[str, float]]]) -> dict[str, Any]:
    """Name -> score over seeds, of the names that every seed has."""
    scores = {}
    for name in (name for name in rows[0] if all(name in row for row in rows)):
        parts = [row[name] for row in rows]
        value, low, high = _over_seeds(parts, _share(parts, models, values(name)))
        if all(0 <= part["low"] <= part["high"] <= 1 for part in parts):  # a share, not a mean of marks
            low, high = max(0.0, low), min(1.0, high)
        scores[name] = {"value": value, "low": low, "high": high, "n": parts[0]["n"]}
    return scores


def _over_seeds(found: Sequence[Mapping[str, Any]], shared: float) -> tuple[float, float, float]:
    return crossed.over_seeds(_ends(found), shared)


def _ends(found: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    return [tuple(math.nan if part[k] is None else part[k] for k in ("value", "low", "high")) for part in found]


def _curve(models: Models) -> list[Point]:
    return [model for (group, _), model in models.items() if group == "fusion" and model.non_refusal]


def _cliff(cliffs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where non-refusal halves, over the seeds in which it does.

    With both spreads whole: crossed by the prompts' influence on it, a number that jumps between steps of the grid, the
    interval held the truth in .91 of the simulations; so it holds it in .98 and more.
    """
    known = [at | {"value": at["half"]} for at in cliffs if at["half"] is not None]
    value, low, high = _over_seeds(known, 1.0) if known else (math.nan,) * 3
    return plain({"half": value, "low": max(low, 0.0), "high": min(high, 1.0),
                  "per_seed": [at["half"] for at in cliffs], "bracket": [at["bracket"] for at in cliffs],
                  "drop": sum(at["drop"] for at in cliffs) / len(cliffs)})


def _gaps(parts: Sequence[Mapping[str, Any]], models: Sequence[Models]) -> list[dict[str, Any]]:
    """The comparisons at equal compliance that every seed has; p is that of the crossed interval, corrected by Holm."""
    by_key = [{(row["group"], row["label"]): row["gap"] for row in part["compared"]} for part in parts]
    compared = []
    for key in by_key[0]:
        if any(key not in found for found in by_key):
            continue  # a lambda that not every seed's sweep went to
        gaps = [found[key] for found in by_key]
        known = [gap["value"] for gap in gaps if gap]
        if len(known) < len(parts):
            compared.append({"label": key[1], "group": key[0], "gap": None})
            continue
        shared = _gap_share(gaps, [mine.get(key) for mine in models], models, [part["seed"] for part in parts])
        value, low, high = _over_seeds(gaps, shared)
        ends = _ends(gaps)
        # one seed has its own p and no spread over seeds
        p = crossed.p_value(ends, shared) if len(ends) > 1 else gaps[0].get("p")
        compared.append({"label": key[1], "group": key[0],
                         "gap": plain({"value": value, "low": low, "high": high, "p": p, "n": len(known)})})
    return corrected(compared)


def _gap_share(gaps: Sequence[Mapping[str, Any]], controls: Sequence[Point | None], models: Sequence[Models],
               seeds: Sequence[int]) -> float:
    """The common share of the prompts' parts of a comparison: those of non-refusal and those of compliance."""
    found = []
    for gap, control, mine, seed in zip(gaps, controls, models, seeds, strict=True):
        curve = _curve(mine)
        part = sweep.equal_compliance(curve, control, seed) if control and control.non_refusal and curve else None
        if part is None or abs(part.difference.value - gap["value"]) > _EQUAL:
            return 1.0
        found.append(part)
    return crossed.share_of([[part.non_refusal for part in found], [part.comply for part in found]])
