"""Answers of made-up runs on disk, evaluators run on them, and what they wrote."""

from __future__ import annotations

import json

import pytest

import data.sources
from data.records import Choice, Record
from evaluator.judges import fitted
from inference import write_rows

REFUSED = "I’m sorry, but I can’t help with that."


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder, small made-up test sets, and a judge that calls every third answer harmful."""
    judge = fitted.HarmJudge(lambda answers: [0.9 if i % 3 == 0 else 0.1 for i in range(len(answers))], {"auc": 0.7})
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr(data.sources, "load_refusal_labels", lambda: [("q", REFUSED, 1), ("q", "Sure.", 0)])
    records = [Record(f"Question {i}?", f"Answer\nnumber {i}.", 0, id=f"r{i}") for i in range(6)]
    monkeypatch.setattr(data.sources, "load_records", lambda task, split, **kw: records)
    choices = [Choice(f"Is {i} odd?", ("Yes.", "No.", "Yes, I think."), (1, 0, 1), 0, f"c{i}") for i in range(5)]
    monkeypatch.setattr(data.sources, "load_choices", lambda name, lite=False: choices)
    return tmp_path / "results"


def put_answers(results, task, outputs, sub="raw", csv_only=False):
    folder = results / "inference" / task / "test" / sub
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, [
        {"index": i, "id": f"{task}-{i}", "prompt": f"{task} prompt {i}", "input": "", "reference": f"ref\n{i}",
         "category": "ab"[i % 2], "rendered": f"<{task} {i}>", "output": output, "finish": "stop"}
        for i, output in enumerate(outputs)
    ])
    if csv_only:
        (folder / "outputs_final.jsonl").unlink()
    return folder


def scores(results, command, sub="raw"):
    return json.loads((results / "scores" / sub / f"{command}.json").read_text())


def rows(results, command, sub="raw"):
    text = (results / "scores" / sub / f"{command}.rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run(module, results, *more, folder="raw"):
    module.main(["--task_name", folder, "--output_dir", str(results), *more])


def pico_flags(pico):
    return ("--model_name_or_path", str(pico), "--dtype", "float32", "--device", "cpu")
