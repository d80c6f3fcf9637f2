"""Dtype and batches are part of what identifies a model's own scores, and stand in the score files for reports."""

from __future__ import annotations

import json

import pytest
import torch
from scored import REFUSED, put_answers, run, scores

import manifest
from evaluator import evaluate_helpfulness, evaluate_safety, report
from evaluator.scoring import engine
from evaluator.statistics import metrics


@pytest.fixture
def scorings(results, monkeypatch):  # noqa: F811
    """evaluate_helpfulness.py without a model on a processor without bfloat16; how often it scored."""
    done = []
    score = metrics.ratio([1.0, 2.0], [2, 2], "nll", "d", higher_is_better=False, seed=0)

    def plan(args, subject):
        return engine.Work({"model": "m"}, lambda: done.append(1) or engine.Result([score], [
            {"set": "nll", "id": str(i), "values": {"nll": 1.0, "tokens": 2}} for i in range(2)]))

    monkeypatch.setattr(evaluate_helpfulness, "plan", plan)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    return done


def edit(results, **config):
    """Make the score file one of an earlier version."""
    file = results / "scores" / "raw" / "evaluate_helpfulness.json"
    content = json.loads(file.read_text())
    content["config"] = {k: v for k, v in (content["config"] | config).items() if v is not None}
    manifest.write_json(file, content)


def test_what_a_likelihood_was_computed_with_identifies_it(results, scorings, monkeypatch):  # noqa: F811
    run(evaluate_helpfulness, results)
    found = scores(results, "evaluate_helpfulness")
    assert (found["config"]["dtype"], found["config"]["batch_tokens"]) == ("float32", 512)
    assert found["made_with"] == {"model": {"dtype": "float32", "batch_tokens": 512}}
    # the registry has it too, where reports read it
    assert manifest.registry(results)[-1]["details"]["made_with"] == found["made_with"]
    run(evaluate_helpfulness, results, "--dtype", "float32")
    assert len(scorings) == 1
    run(evaluate_helpfulness, results, "--batch_tokens", "1024")
    assert len(scorings) == 2
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    run(evaluate_helpfulness, results, "--batch_tokens", "1024")
    assert len(scorings) == 3
    assert scores(results, "evaluate_helpfulness")["config"]["dtype"] == "bfloat16"


def test_scores_of_an_earlier_version_stay_for_calls_that_say_what_they_said(results, scorings, caplog):  # noqa: F811
    run(evaluate_helpfulness, results)
    edit(results, dtype="auto", batch_tokens=None)
    caplog.set_level("INFO")
    run(evaluate_helpfulness, results, "--batch_tokens", "1024")
    assert len(scorings) == 1
    assert "says --dtype auto and not what that was; taken for float32" in caplog.text
    run(evaluate_helpfulness, results, "--dtype", "float32")
    assert len(scorings) == 2


def test_judges_of_answers_are_not_scored_again_for_another_dtype(results, monkeypatch):  # noqa: F811
    put_answers(results, "safety", [REFUSED, "Sure."])
    folder = results / "inference" / "safety" / "test" / "raw"
    manifest.write_json(folder / manifest.MANIFEST, {"config": {"dtype": "bfloat16", "batch_size": 50}, "metrics": {}})
    run(evaluate_safety, results)
    found = scores(results, "evaluate_safety")
    assert found["made_with"] == {"answers": {"safety": {"dtype": "bfloat16", "batch_size": 50}}}
    assert found["config"]["dtype"] == "auto"
    stamp = (results / "scores" / "raw" / "evaluate_safety.json").stat().st_mtime_ns
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    run(evaluate_safety, results)
    assert (results / "scores" / "raw" / "evaluate_safety.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("config", "known"), [
    ({"dtype": "bfloat16", "batch_size": 9, "backend": "static"}, {"dtype": "bfloat16", "batch_size": 9,
                                                                   "backend": "static"}),
    ({"dtype": "float32", "batch_size": 9}, {"dtype": "float32", "batch_size": "any"}),
    ({"dtype": "float32", "do_sample": True, "batch_size": 9}, {"dtype": "float32", "batch_size": 9}),
    ({"dtype": "auto"}, {}), ({}, {})])
def test_what_a_manifest_says_of_answers(results, config, known):  # noqa: F811
    put_answers(results, "safety", [REFUSED])
    folder = results / "inference" / "safety" / "test" / "raw"
    manifest.write_json(folder / manifest.MANIFEST, {"config": config, "metrics": {}})
    run(evaluate_safety, results)
    assert scores(results, "evaluate_safety")["made_with"]["answers"] == {"safety": known}


def test_a_report_says_that_answers_came_in_other_batches(results, monkeypatch):  # noqa: F811
    from evaluator.judges import fitted

    known = {"auc": 0.8, "auc_rated": 0.8, "missed": 0.1, "false_alarms": 0.1, "protocol": "5-fold"}
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(lambda answers: [0.1] * len(answers), known))
    for sub, size in (("raw", 50), ("cross_x", 7)):
        folder = put_answers(results, "safety", [REFUSED, "Sure."], sub)
        manifest.write_json(folder / manifest.MANIFEST, {"config": {
            "dtype": "bfloat16", "batch_size": size, "run": sub.removeprefix("cross_")}, "metrics": {}})
        run(evaluate_safety, results, folder=sub)
    report.main(["--runs", "base,x", "--output_dir", str(results), "--name", "t"])
    text = (results / "report" / "t.md").read_text()
    assert "x and base on refusal ↑ (batch size 7 and 50)." in text
    assert "| base |" in text.split("minus each other row")[1]
