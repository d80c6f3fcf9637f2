"""Held-out likelihood of tasks, rows of several runs in the report, and tasks in training."""

from __future__ import annotations

import json

import pytest
from runs import align, common

from data.records import Record
from evaluator import evaluate_skills, report

TASKS = ("english", "maths")


@pytest.fixture
def tasks(monkeypatch):
    """Two tasks of twelve rows, none of them fetched."""
    def rows(task, split, **options):
        return [Record(f"{task} {split} question {i}", "yes it is " * (1 + i % 3), 0, id=f"{task}-{split}-{i}")
                for i in range(12)]
    monkeypatch.setattr("data.sources.load_records", rows)


@pytest.fixture
def scored(pico, tmp_path, tasks):
    def run(*flags, skills="english,maths"):
        evaluate_skills.main(["--task_name", "raw", "--skills", skills, *common(pico, tmp_path)[:-2], *flags])
        name = "evaluate_skills" + (".english_maths" if skills == "english,maths" else "")
        return json.loads((tmp_path / "scores" / "raw" / f"{name}.json").read_text())
    return run


def test_every_task_gets_its_likelihood(scored, tmp_path, pico):
    found = scored()
    assert set(found["scores"]) == {"nll_english", "nll_maths"}
    rows = [json.loads(line) for line in
            (tmp_path / "scores" / "raw" / "evaluate_skills.english_maths.rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    mine = [row["values"] for row in rows if row["set"] == "nll_maths"]
    want = sum(v["nll"] for v in mine) / sum(v["tokens"] for v in mine)
    assert found["scores"]["nll_maths"]["value"] == pytest.approx(want, rel=1e-4)
    assert found["scores"]["nll_maths"]["low"] < want < found["scores"]["nll_maths"]["high"]
    assert len(scored("--num_samples", "5", skills="english")["scores"]) == 1
    # English alone did not take the scores of both away
    from evaluator.statistics.comparison import measured

    assert set(measured(tmp_path, "base").scores) == {"nll_english", "nll_maths"}


def test_unknown_tasks_and_missing_runs(scored, capsys):
    with pytest.raises(SystemExit) as stop:
        scored(skills="english,cooking")
    assert stop.value.code == 2
    assert "cooking is no task; allowed: english, chinese" in capsys.readouterr().err


def test_a_row_over_several_runs_has_their_mean_and_a_t_interval(pico, tmp_path, tasks, capsys):
    flags = ("--moe_flag", "0", "--learning_rate", "0.05", "--max_steps", "2")
    for i in (1, 2, 3):
        align(pico, tmp_path, {}, "english", *flags, "--run_name", f"m{i}", "--seed", str(i))
    evaluate_skills.main(["--task_name", "raw,cross_m1,cross_m2,cross_m3", "--skills", "english",
                           *common(pico, tmp_path)[:-2]])
    report.main(["--runs", "base=base,one=m1,three=m1+m2+m3", "--output_dir", str(tmp_path), "--name", "several"])
    text = (tmp_path / "report" / "several.md").read_text()
    values = [json.loads((tmp_path / "scores" / f"cross_m{i}" / "evaluate_skills.json").read_text())
              ["scores"]["nll_english"]["value"] for i in (1, 2, 3)]
    assert len(set(values)) == 3
    row = next(line for line in text.splitlines() if line.startswith("| three |"))
    assert f"{sum(values) / 3:.3f} [" in row
    assert "| three | m2 |" in text
    assert "Rows of several runs: their mean" in text
    against = next(line for line in text.splitlines() if line.startswith("| base |") and ("better" in line or "worse" in line
                                                                                           or "difference" in line))
    assert against
