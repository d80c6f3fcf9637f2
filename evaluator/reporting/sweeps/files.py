"""A sweep's report read back from its JSON file, checked: everything that ``sweep_seeds`` reads is what a sweep writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errors import UserError
from evaluator.statistics.axes import DISCRIMINATION
from evaluator.statistics.score_files import is_number

#: What a report has, and its kind.
_PARTS = {"rows": list, "styles": dict, "compared": list, "cliff": dict, "seed": int, "task": str, "safety": str,
          "form": str, "style": str, "utility": str}
#: Parts of a row: its scores, and tables of more.
_SCORES, _TABLES = ("non_refusal", "compliance", "nll"), ("judged", "by_category", "benchmarks")
#: Scores that not every sweep has.
_FURTHER = ("broken", *DISCRIMINATION)


def read_report(file: Path) -> dict[str, Any]:
    """The content of results/report/NAME.json of scripts/sweep.py, under today's keys.

    Raises:
        UserError: it is damaged, or something else; names the part that is not as a sweep writes it.
    """
    try:
        part = current(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        part = None
    if problem := _problem(part):
        raise UserError(f"--roots: {file} is no report of scripts/sweep.py, or damaged ({problem}); run the sweep there "
                        "again")
    return part


def current(found: Any) -> Any:
    """A sweep's JSON under today's keys: reports from before called the share of prompts without a refusal ``harm``.

    They also took broken text for compliance, which cannot be told from them; ``broken_complies`` says so. What is no
    report of a sweep comes back as it is.
    """
    def named(rows: Any) -> Any:
        return [renamed(row) for row in rows] if isinstance(rows, list) else rows

    def renamed(row: Any) -> Any:
        return {"non_refusal" if k == "harm" else k: v for k, v in row.items()} if isinstance(row, dict) else row

    rows, styles = (found.get("rows"), found.get("styles")) if isinstance(found, dict) else (None, None)
    if not isinstance(rows, list) or not any(isinstance(row, dict) and "harm" in row for row in rows):
        return found
    return {**found, "rows": named(rows), "broken_complies": True,
            "styles": {style: named(of) for style, of in styles.items()} if isinstance(styles, dict) else styles}


def _problem(part: Any) -> str:
    if not isinstance(part, dict):
        return "no mapping"
    if odd := [key for key, kind in _PARTS.items() if not isinstance(part.get(key), kind)]:
        return ", ".join(odd)
    if not all(isinstance(rows, list) and all(map(_row, rows)) for rows in (part["rows"], *part["styles"].values())):
        return "rows"
    if not _cliff(part["cliff"]):
        return "cliff"
    if not isinstance(part.get("compared_auc", []), list) or not all(map(_told_apart, part.get("compared_auc", []))):
        return "compared_auc"
    return "" if all(map(_gap, part["compared"])) else "compared"


def _row(row: Any) -> bool:
    if not _named(row, "run") or not _numbers(row.get("weight")):
        return False
    tables = [row.get(name, {}) for name in _TABLES]
    if not all(isinstance(table, dict) for table in tables):
        return False
    # a row has further scores of its own, those of generated answers
    more = [value for key, value in row.items()
            if key in _FURTHER or isinstance(value, dict) and key not in (*_SCORES, *_TABLES)]
    scores = [*(row.get(name) for name in _SCORES), *more, *(score for table in tables for score in table.values())]
    return all(_score(score) and isinstance(score.get("n"), int) for score in scores)


def _gap(row: Any) -> bool:
    gap = row.get("gap") if _named(row) else 0
    return gap is None or (_score(gap) and is_number(gap["value"]))


def _told_apart(row: Any) -> bool:
    """Whether it is a comparison of AUCs: a gap, and where there is one the weights and the likelihoods on both sides."""
    if not _gap(row) or row.get("gap") is None:
        return _gap(row)
    lists = [row.get(name) for name in ("weights", "control_weights", "nll")]
    return (all(isinstance(found, list) for found in lists) and all(map(is_number, [*lists[0], *lists[1]]))
            and len(lists[2]) == 2 and _numbers(*lists[2]) and _numbers(row["gap"].get("p")))


def _cliff(at: dict[str, Any]) -> bool:
    bracket = at.get("bracket")
    return (_score(at, "half") and is_number(at.get("drop")) and isinstance(bracket, list) and len(bracket) == 2
            and all(map(is_number, bracket)))


def _named(row: Any, *more: str) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("label", "group", *more))


def _score(score: Any, value: str = "value") -> bool:
    keys = (value, "low", "high")
    return isinstance(score, dict) and all(key in score for key in keys) and _numbers(*(score[key] for key in keys))


def _numbers(*values: Any) -> bool:
    """Whether all are numbers, or null: not known."""
    return all(value is None or is_number(value) for value in values)
