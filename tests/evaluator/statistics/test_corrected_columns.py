"""Refusal and over-refusal corrected for the judge's errors, as columns of a report: values, differences, empty cells."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from reported import table

import manifest
from evaluator import report
from evaluator.statistics import metrics
from evaluator.statistics.axes import CORRECTED
from evaluator.statistics.comparison import difference, measured
from evaluator.statistics.corrected import Errors, corrected_difference, errors_of, rogan_gladen, with_corrected

TITLES = ("refusal, any text, corrected for the judge's errors ↑", "over-refusal, corrected for the judge's errors ↓")
GOOD = {"safety": Errors(42, 45, 35, 35), "overrefusal": Errors(13, 14, 60, 66)}


def put(results, run, refused, over, errors=GOOD, labels=None, seed=42):
    """Scores and rows as evaluate_safety.py writes them: answers 0 .. n - 1 refused of 100."""
    sub = "raw" if run == "base" else f"cross_{run}"
    hits = {"safety": [int(i < refused) for i in range(100)], "overrefusal": [int(i < over) for i in range(100)]}
    scores = [metrics.rate(hits["safety"], "refusal", "declines", higher_is_better=True),
              metrics.rate(hits["safety"], "safe_refusal", "refuses in text", higher_is_better=True),
              metrics.rate(hits["overrefusal"], "overrefusal", "refuses harmless ones", higher_is_better=False)]
    folder = results / "scores" / sub
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluate_safety.rows.jsonl").write_text("\n".join(json.dumps(
        {"set": name, "id": str(i), "values": {"refusal": hit, "safe_refusal": hit}})
        for name, found in hits.items() for i, hit in enumerate(found)))
    keyword = {name: found.as_dict() for name, found in (errors or {}).items()}
    keyword["all"] = next(iter(keyword.values()), {})
    own = {"answers": 160, "judges": {"keyword": keyword}} if errors else {}
    manifest.register(results, {"kind": "score", "run": run, "sub": sub, "command": "evaluate_safety", "seed": seed,
                                "scores": {s.name: s.as_dict() for s in scores},
                                "details": {"judges": {"own": own, **({"labels": labels} if labels else {})}}})


def write(results, *more, runs="base,b"):
    report.main(["--runs", runs, "--output_dir", str(results), "--name", "t", *more])
    return (results / "report" / "t.md").read_text()


def test_columns_stand_beside_the_raw_ones_when_asked_for(tmp_path):
    put(tmp_path, "base", 20, 5)
    put(tmp_path, "b", 80, 40)
    plain = write(tmp_path)
    assert not any(title in plain for title in TITLES)
    assert "Lang and Reiczigel's interval" not in plain
    text = write(tmp_path, "--columns", "refusal,refusal_corrected,overrefusal_corrected")
    cells = table(text)["b"]
    # (.8 + 1 - 1) / (42 / 45): a judge that misses and never cries wolf makes a rate too low
    want = rogan_gladen(metrics.rate([1] * 80 + [0] * 20, "", "", higher_is_better=True), GOOD["safety"], "", "")
    assert want.value == pytest.approx(0.8 * 45 / 42)
    assert cells[TITLES[0]] == f"{want.value:.3f} [{want.low:.3f}, {want.high:.3f}]"
    assert cells["refusal, any text ↑"].startswith("0.800 [")
    over = (0.4 + 60 / 66 - 1) / (13 / 14 + 60 / 66 - 1)
    assert cells[TITLES[1]].startswith(f"{over:.3f} [")
    assert "Corrected rates: Lang and Reiczigel's interval" in text
    assert "sensitivity (42 of 45) and specificity (35 of 35) on labelled answers of the embedded models" in text
    # another reading of the same answers is no further axis of the findings, and rows need not have its mean
    assert "Not what the rows say" not in text
    text = write(tmp_path, "--columns", "refusal_corrected", "--against", "base")
    assert "corrected for the judge's" not in text.split("## Findings")[1].split("## Notes")[0]


def test_a_difference_is_divided_and_keeps_its_p(tmp_path):
    put(tmp_path, "base", 20, 5)
    put(tmp_path, "b", 50, 40)
    axis = CORRECTED[0]
    a, b = (with_corrected(measured(tmp_path, run), CORRECTED) for run in ("b", "base"))
    raw, found = difference(a, b, axis.parts[0]), difference(a, b, axis)
    assert found.value == pytest.approx(0.3 * 45 / 42)
    assert found.p == raw.p
    # no surer than the raw one, and wider for the doubt about the errors
    assert found.value - found.low > (raw.value - raw.low) * 45 / 42
    shown = table(write(tmp_path, "--columns", "refusal_corrected", runs="base,b"), "b minus each other row")["base"]
    assert shown[TITLES[0]].startswith(f"+{found.value:.3f} [")
    assert shown[TITLES[0]].endswith("better")


@pytest.mark.parametrize("errors", [None, {"safety": Errors(20, 40, 20, 40)}, {"safety": Errors(9, 9, 50, 50)},
                                    {"safety": Errors(10, 40, 20, 40)}])
def test_a_judge_that_tells_nothing_leaves_the_cells_empty(tmp_path, errors):
    put(tmp_path, "base", 20, 5, errors)
    put(tmp_path, "b", 50, 40)
    text = write(tmp_path, "--columns", "refusal_corrected,overrefusal_corrected")
    assert table(text)["base"][TITLES[0]] == table(text)["base"][TITLES[1]] == ""
    assert table(text)["b"][TITLES[0]] != ""
    # nothing to compare with
    assert table(text, "b minus each other row")["base"][TITLES[0]] == ""
    assert errors_of(measured(tmp_path, "base"), CORRECTED[0].parts[0]) is None


def test_labels_of_the_user_win_over_ours(tmp_path):
    mine = Errors(30, 40, 40, 40)
    put(tmp_path, "base", 20, 5, labels={"refusal": {"correction": "rogan-gladen", **mine.as_dict()}})
    put(tmp_path, "b", 50, 40, labels={"refusal": {"correction": "ppi", **mine.as_dict()}})
    assert errors_of(measured(tmp_path, "base"), CORRECTED[0].parts[0]) == mine
    # each model corrected by its own answers: no errors that both share
    assert errors_of(measured(tmp_path, "b"), CORRECTED[0].parts[0]) is None
    put(tmp_path, "c", 50, 40, labels={"refusal": {"correction": "none", "why": "none labelled"}})
    assert errors_of(measured(tmp_path, "c"), CORRECTED[0].parts[0]) == GOOD["safety"]


def test_errors_come_back_from_a_score_file_and_damage_does_not():
    for errors in (*GOOD.values(), Errors(0, 10, 10, 10)):
        assert Errors.read(json.loads(json.dumps(errors.as_dict()))) == errors
    for told in (None, {}, {"sensitivity": 1}, {"sensitivity": {"value": 1.0, "n": 3}},
                 {"sensitivity": {"value": None, "n": 3}, "specificity": {"value": 1.0, "n": 3}}):
        assert Errors.read(told) is None


@pytest.mark.parametrize(("truths", "sensitivity", "specificity"), [
    ((0.7, 0.3), 0.9, 0.97), ((0.6, 0.5), 0.75, 0.9), ((0.9, 0.1), 0.6, 0.95), ((0.3, 0.3), 0.8, 0.8)])
def test_the_interval_of_the_difference_covers(truths, sensitivity, specificity):
    """Of 2,000 studies of 100 answers of two models and 80 labels that correct both; raw differences are too small."""
    rng, studies, n, covered, plain = np.random.default_rng(18), 2000, 100, 0, 0
    for _ in range(studies):
        yes = rng.binomial(80, 0.5)
        hits, passes = rng.binomial(yes, sensitivity), rng.binomial(80 - yes, specificity)
        errors = Errors(*map(int, (hits, yes, passes, 80 - yes)))
        both = [np.where(rng.random(n) < truth, rng.random(n) < sensitivity, rng.random(n) < 1 - specificity)
                for truth in truths]
        raw = metrics.mcnemar(*both)
        if errors.problem():
            studies -= 1
            continue
        found, gap = corrected_difference(raw, errors), truths[0] - truths[1]
        covered += found.low <= gap <= found.high
        plain += raw.low <= gap <= raw.high
    assert covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    if abs(truths[0] - truths[1]) > 0.5:
        assert plain / studies < 0.9
