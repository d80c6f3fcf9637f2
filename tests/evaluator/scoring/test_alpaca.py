"""The alpaca_eval command: what it is given, how its leaderboard comes back, what is said when it cannot run."""

from __future__ import annotations

import json
import math
import sys

import pytest
from fault_server import FaultServer, serving
from scored import put_answers

import manifest
from errors import UserError
from evaluator import evaluate_helpfulness
from evaluator.scoring import alpaca

KEY = "sk-test-alpaca-not-a-real-key"
LEADERBOARD = """\
,win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,avg_length
base,62.5,4.0,5,3,0,8,62.5,community,12
other,100.0,,8,0,0,8,100.0,community,9
broken,none,,8,0,0,8,,community,9
"""
#: Stands for the real command: prefers an answer of more than 9 characters, leaves the last one out.
FAKE = f"""\
#!{sys.executable}
import json, os, pathlib, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
name = json.loads(flags["name"])
answers = json.loads(pathlib.Path(flags["model_outputs"]).read_text())
references = json.loads(pathlib.Path(flags["reference_outputs"]).read_text())
print("key", os.environ["OPENAI_API_KEY"], os.environ["IS_ALPACA_EVAL_2"])
if answers[0]["output"] == "crash":
    sys.exit(f"Traceback ... bad key {{os.environ['OPENAI_API_KEY']}}")
said = [{{"instruction": row["instruction"], "output_1": reference["output"], "output_2": row["output"],
         "preference": 2 if len(row["output"]) > 9 else 1.5 if row["output"] == "tie" else 1}}
        for row, reference in zip(answers[:-1], references)]
wins = sum(row["preference"] - 1 for row in said)
folder = pathlib.Path(flags["output_path"], flags["annotators_config"])
folder.mkdir(parents=True)
(folder / "leaderboard.csv").write_text(
    f",win_rate,standard_error,n_total\\n{{name}},{{100 * wins / len(said)}},10.0,{{len(said)}}\\n")
(folder / "annotations.json").write_text(json.dumps(said))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The fake command first on PATH, and a key."""
    path = tmp_path / "bin" / "alpaca_eval"
    path.parent.mkdir()
    path.write_text(FAKE)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return path


@pytest.fixture
def nothing_else(monkeypatch):
    """evaluate_helpfulness without its likelihoods, which need a model."""
    from evaluator.scoring import engine
    monkeypatch.setattr(evaluate_helpfulness, "plan", lambda args, subject: engine.Work(
        {}, lambda: engine.Result([], [])))


def run(results, *more):
    evaluate_helpfulness.main(["--task_name", "raw", "--output_dir", str(results), *more])


def test_scores_rows_and_registry(tmp_path, installed, nothing_else, capfd):
    results = tmp_path / "results"
    put_answers(results, "helpfulness", ["a long answer", "tie", "short", "also a long one", "left out", "sixth"])
    run(results, "--alpaca_eval", "5")
    found = json.loads((results / "scores" / "raw" / "alpaca_eval.json").read_text())
    assert len(found) == 6  # the export for judges elsewhere holds every answer
    row = manifest.registry(results)[-1]
    assert (row["command"], row["run"]) == ("evaluate_alpaca", "base")
    score = row["scores"]["alpaca_eval.win_rate"]
    assert (score["value"], score["n"]) == (0.625, 4)
    assert (score["low"], score["high"]) == pytest.approx((0.625 - 0.196, 0.625 + 0.196), abs=1e-3)
    assert row["details"] == {"annotator": "alpaca_eval_gpt4", "answers_task": "helpfulness", "sent": 5, "unjudged": 1}
    lines = [json.loads(line) for line in (results / "scores/raw/evaluate_alpaca.rows.jsonl").read_text().splitlines()]
    assert [line["values"]["alpaca_eval.win_rate"] for line in lines] == [1, 0.5, 0, 1]
    sent = json.loads((results / "scores/raw/alpaca_eval/model_outputs.json").read_text())
    assert [row["generator"] for row in sent] == ["base"] * 5
    log = (results / "scores/raw/alpaca_eval/alpaca_eval.log").read_text()
    assert log == "key *** False\n"
    run(results, "--alpaca_eval", "5")
    assert len(manifest.registry(results)) == 2


def test_the_installed_command(tmp_path, nothing_else):
    """alpaca_eval itself, published setting, its GPT-4 played by a server on loopback that prefers the longer answer."""
    def rank(messages):
        first, second = (len(text.split('"""')[0]) for text in messages[-1]["content"].split('"answer": """')[1:])
        return str([{"model": "model_1", "rank": 1 + (second > first)}, {"model": "model_2", "rank": 1 + (first >= second)}])

    results = tmp_path / "results"
    put_answers(results, "helpfulness", ["much longer than ref", "no", "", "also longer", "not sent"])
    with serving(FaultServer(rank)) as server:
        run(results, "--alpaca_eval", "4", "--judge_base_url", server.url)
        assert len(server.seen) == 4
        assert {body["model"] for body in server.bodies} == {"gpt-4"}
        run(results, "--alpaca_eval", "4", "--judge_base_url", server.url, "--overwrite")
        assert len(server.seen) == 4
    row = manifest.registry(results)[-1]
    score = row["scores"]["alpaca_eval.win_rate"]
    assert (score["value"], score["n"], row["details"]["unjudged"]) == (0.5, 4, 0)
    lines = [json.loads(line) for line in (results / "scores/raw/evaluate_alpaca.rows.jsonl").read_text().splitlines()]
    assert [line["values"]["alpaca_eval.win_rate"] for line in lines] == [1, 0, 0, 1]


def test_a_failure_names_the_log_and_not_the_key(tmp_path, installed, nothing_else, capfd):
    put_answers(tmp_path / "results", "helpfulness", ["crash", "b"])
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "results", "--alpaca_eval", "-1")
    assert stop.value.code == 2
    said = "".join(capfd.readouterr())
    assert "alpaca_eval ended with code 1 (Traceback ... bad key ***); all it said" in said
    assert KEY not in said + "".join(p.read_text() for p in (tmp_path / "results").rglob("*.*"))


def test_what_is_missing_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        run(tmp_path, "--alpaca_eval", "50")
    assert "OPENAI_API_KEY: --alpaca_eval asks https://api.openai.com/v1 and needs its key" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(alpaca.shutil, "which", lambda *_, **__: None)
    put_answers(tmp_path, "helpfulness", ["a", "b"], csv_only=True)
    with pytest.raises(SystemExit):
        run(tmp_path, "--alpaca_eval", "50")
    said = capsys.readouterr().err
    assert "--alpaca_eval 50: the command alpaca_eval is not installed; pip install -r requirements.txt" in said
    assert "2 of 2 answers of base have no reference" in said


def test_leaderboard(tmp_path):
    path = tmp_path / "leaderboard.csv"
    path.write_text(LEADERBOARD)
    row = alpaca.read_leaderboard(path, "base")
    assert (row["win_rate"], row["standard_error"], row["n_total"]) == (62.5, 4, 8)
    assert math.isnan(alpaca.read_leaderboard(path, "other")["standard_error"])
    for name, said in (("nobody", "has no row nobody; rows: base, other, broken"), ("broken", "win_rate 'none'")):
        with pytest.raises(UserError, match=said):
            alpaca.read_leaderboard(path, name)
    path.write_bytes(b"\xff\xfe")
    for damaged in (path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match="no leaderboard that can be read"):
            alpaca.read_leaderboard(damaged, "base")


def test_an_interval_ends_at_the_bounds_and_needs_an_error():
    row = {"win_rate": 99.0, "standard_error": 4.0, "n_total": 8.0}
    assert alpaca._score(row, "win_rate", "n", "d", 8).high == 1
    assert math.isnan(alpaca._score(row | {"standard_error": math.nan}, "win_rate", "n", "d", 8).low)
