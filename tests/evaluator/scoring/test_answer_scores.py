"""Scores of generated answers: numeric match and ROUGE, from inference.py through evaluate_skills.py to a sweep's report."""

from __future__ import annotations

import json

import pytest
from runs import common

import inference
from config import parse
from data.records import Record
from errors import UserError
from evaluator import evaluate_skills
from evaluator.judges import fitted
from evaluator.scoring import answer_scores
from flags.inference import InferenceArgs
from flags.skills import ANSWERED_SKILLS
from scripts import sweep as driver


def test_the_flags_know_every_task():
    assert tuple(answer_scores.TASKS) == ANSWERED_SKILLS
    assert all(parse(InferenceArgs, ["--task_name", task]).args.answers_name == task for task in ANSWERED_SKILLS)


@pytest.mark.parametrize(("answer", "reference", "want"), [
    ("9 (apples)", "9 apples", 1), ("3 + 6 = 9.", "9", 1), ("She has 9, so he has 8", "9", 0), ("", "9", 0),
    ("It is 1,200.0 kg", "1200 kg", 1), ("so 18", "9 * 2 = 18\n#### 18", 1), ("so 9", "9 * 2 = 18\n#### 18", 0),
    ("Ted", "Ted", None), ("4; 2", "4; 2", None)])
def test_numbers(answer, reference, want):
    assert answer_scores.number_values(answer, reference) == (None if want is None else {"match": want})


def test_rouge_by_hand():
    # one of two words, stemmed; no pair in common; F1 of 1/1 and 1/2
    found = answer_scores.rouge_values("cats", "The cat")
    assert found == {"rouge1": pytest.approx(2 / 3), "rouge2": 0, "rougeL": pytest.approx(2 / 3)}
    # a, b, c, d against b, a, c, d: all words, one pair of three, three in order
    found = answer_scores.rouge_values("red green blue grey", "green red blue grey")
    assert found == {"rouge1": 1, "rouge2": pytest.approx(1 / 3), "rougeL": pytest.approx(3 / 4)}
    assert answer_scores.rouge_values("", "The cat") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert answer_scores.rouge_values("The cat", " ") is None


def test_scores_have_their_intervals():
    (match,) = answer_scores.scores("maths", {"match": [1.0] * 3 + [0.0] * 9}, 0)
    assert (match.name, match.value, match.n) == ("maths_match", 0.25, 12)
    assert (match.low, match.high) == (pytest.approx(0.0889, abs=1e-3), pytest.approx(0.5323, abs=1e-3))  # Wilson
    first, *_ = answer_scores.scores("summaries", {k: [0.1, 0.2, 0.3, 0.6] for k in ("rouge1", "rouge2", "rougeL")}, 0)
    assert first.value == pytest.approx(0.3)
    assert 0.1 <= first.low < 0.3 < first.high <= 0.6


def test_answers_without_any_reference_are_an_error():
    with pytest.raises(UserError, match="no answer comes with a reference"):
        answer_scores.rows("maths", [{"id": "1", "category": "", "output": "9", "reference": ""}])


@pytest.fixture
def held_out(monkeypatch):
    """Twelve held-out rows of each task, none fetched; the first of maths has no number."""
    def rows(task, split, **options):
        answers = {"maths": lambda i: f"{i} apples" if i else "Ted", "summaries": lambda i: f"It is round and green {i}."}
        return [Record(f"{task} {split} question {i}", answers[task](i), 0, id=f"{task}-{i}") for i in range(12)]
    monkeypatch.setattr("data.sources.load_records", rows)


def scored(out, task, run="raw"):
    return json.loads((out / "scores" / run / f"evaluate_skills.{task}_answers.json").read_text())


def test_generated_answers_are_scored_and_found_again(pico, tmp_path, held_out, capsys, caplog):
    caplog.set_level("INFO")
    flags = common(pico, tmp_path)[:-2]
    ask = ["--task_name", "raw", "--skills", "maths_answers,summaries_answers,summaries", *flags]
    with pytest.raises(SystemExit):
        evaluate_skills.main(ask)
    said = capsys.readouterr().err
    assert "make them with: python inference.py --task_name maths --aligned_flag 0 --dataset_type test" in said
    assert not (tmp_path / "scores").exists()
    for task in ("maths", "summaries"):
        inference.main(["--task_name", task, "--cross_task", "base", "--max_new_tokens", "4", *flags])
    evaluate_skills.main(ask)
    maths, summaries = scored(tmp_path, "maths"), scored(tmp_path, "summaries")
    assert maths["scores"]["maths_match"]["n"] == 11
    assert maths["answers"] == {"cut_at_limit": maths["answers"]["cut_at_limit"], "without_reference": 1}
    assert set(summaries["scores"]) == {"summaries_rouge1", "summaries_rouge2", "summaries_rougeL"}
    likelihood = json.loads((tmp_path / "scores" / "raw" / "evaluate_skills.summaries.json").read_text())
    assert set(likelihood["scores"]) == {"nll_summaries"}
    caplog.clear()
    evaluate_skills.main(ask)
    assert caplog.text.count("already scored") == 3


def test_planted_answers_get_the_score_that_they_deserve(pico, tmp_path, held_out):
    flags = common(pico, tmp_path)[:-2]
    inference.main(["--task_name", "maths", "--cross_task", "base", "--max_new_tokens", "2", *flags])
    path = tmp_path / "inference" / "maths" / "test" / "raw" / "outputs_final.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["output"] = f"That makes {int(row['id'].partition('-')[2]) % 6}."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate_skills.main(["--task_name", "raw", "--skills", "maths_answers", *flags])
    assert scored(tmp_path, "maths")["scores"]["maths_match"]["value"] == pytest.approx(5 / 11)


def test_an_unknown_kind_of_answers(capsys):
    with pytest.raises(SystemExit):
        evaluate_skills.main(["--task_name", "raw", "--skills", "english_answers"])
    assert "english_answers is no task" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [6, 0])
def test_a_sweep_answers_task_rows_and_shows_the_column(pico, make_adapter, tmp_path, held_out, monkeypatch, rows):
    for seed, name in enumerate(("maths", "safe")):
        make_adapter(pico, tmp_path / "outputs" / name, seed=seed, r=8, alpha=32, targets=("q_proj", "v_proj"))
    tasks = inference.prompts_of

    def prompts(args):
        if args.task_name in ANSWERED_SKILLS:
            return tasks(args)
        return [Record(f"{args.task_name} {i}?", "", 1, id=f"{args.task_name}-{i}") for i in range(4)], {}

    judge = fitted.HarmJudge(lambda answers: [0.1] * len(answers), {"auc": 0.7})
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr(inference, "prompts_of", prompts)
    flags = [*common(pico, tmp_path)[:-2], "--task", "maths", "--safety", "safe", "--utility", "maths", "--grid", "0,0.4",
             "--refine", "0", "--num_samples", "4", "--max_new_tokens", "2", "--controls", "aligned model=base", "--reverse",
             "false", "--name", "maths", "--prompt_styles", "none,orbit"]
    driver.main([*flags, "--utility_answers", str(rows)])
    report = (tmp_path / "report" / "maths.md").read_text()
    found = json.loads((tmp_path / "report" / "maths.json").read_text())
    heads = "| row | non-refusal ↓ | compliance ↑ | broken ↓ | maths NLL ↓ |"
    heads += (" numeric match ↑ |" if rows else "") + " front |"
    assert heads in report
    assert ("- numeric match: share of generated answers" in report) == bool(rows)
    assert all(("maths_match" in row) == bool(rows) for row in (*found["rows"], *found["styles"]["orbit"]))
    if rows:
        assert {row["label"] for row in found["rows"]} >= {"lambda 0", "lambda 0.4", "aligned model"}
        assert all(5 <= row["maths_match"]["n"] <= 6 for row in found["rows"])
        assert (tmp_path / "inference" / "maths" / "test" / "cross_maths@0.6_safe@0.4" / "outputs_final.jsonl").is_file()
        # the other style asks the same rows: nothing is answered twice
        assert not (tmp_path / "inference" / "maths+orbit").exists()
