"""A results folder for evaluators: made-up test sets, a made-up judge, nothing fetched."""

from __future__ import annotations

import pytest
from scored import REFUSED

import data.sources
from data.records import Choice, Record
from evaluator.judges import fitted


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
