"""Score files and registry lines: a kill at any moment leaves nothing that a second call does not put right."""

import json
import logging

import pytest
from scored import REFUSED, put_answers, rows, run, scores

import manifest
from errors import UserError
from evaluator import evaluate_safety
from evaluator.scoring import engine
from evaluator.statistics import comparison


def lines(folder):
    return manifest.registry(folder)


def cut(*_, **__):
    raise KeyboardInterrupt


def killed(monkeypatch, module, name, results, *words):  # noqa: F811
    """Run the command and kill it where it calls module.name."""
    with monkeypatch.context() as patched:
        patched.setattr(module, name, cut)
        with pytest.raises(KeyboardInterrupt):
            run(evaluate_safety, results, *words)


def without(line, *keys):
    return {key: value for key, value in line.items() if key not in keys}


def test_a_kill_before_the_registry_line_is_made_good(results, monkeypatch, tmp_path):  # noqa: F811
    put_answers(results, "safety", [REFUSED, "Sure."])
    run(evaluate_safety, results)
    whole = lines(results)
    manifest.remove(results / "scores")
    (results / "registry.jsonl").unlink()
    killed(monkeypatch, manifest, "register", results)
    path = results / "scores" / "raw" / "evaluate_safety.json"
    before = path.read_bytes()
    assert lines(results) == []
    run(evaluate_safety, results)
    run(evaluate_safety, results)
    assert path.read_bytes() == before
    # the very line that an undisturbed call writes, once
    assert [without(line, "time") for line in lines(results)] == [without(line, "time") for line in whole]


def test_a_line_of_an_older_call_does_not_pass_for_the_missing_one(results, monkeypatch):  # noqa: F811
    put_answers(results, "safety", [REFUSED, "Sure."])
    for words in ((), ("--num_samples", "1")):
        run(evaluate_safety, results, *words)
    # the first call again, killed before its line: one like it stands there, but below a newer one
    killed(monkeypatch, manifest, "register", results)
    assert len(lines(results)) == 2
    with pytest.raises(UserError, match="not the rows of the scores in the registry"):
        comparison.measured(results, "base")
    run(evaluate_safety, results)
    assert [line["scores"]["refusal"]["n"] for line in lines(results)] == [2, 1, 2]
    assert len([key for key in comparison.measured(results, "base").rows if key[0] == "safety"]) == 2


def test_rows_of_another_call_are_found_out(results, monkeypatch, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    put_answers(results, "safety", [REFUSED, "Sure."])
    run(evaluate_safety, results)
    whole = scores(results, "evaluate_safety"), rows(results, "evaluate_safety")
    killed(monkeypatch, manifest, "write_json", results, "--num_samples", "1")
    assert len(rows(results, "evaluate_safety")) == 1
    assert scores(results, "evaluate_safety") == whole[0]
    run(evaluate_safety, results)
    assert "already scored" not in caplog.text
    assert rows(results, "evaluate_safety") == whole[1]
    assert without(scores(results, "evaluate_safety"), "seconds") == without(whole[0], "seconds")


def test_score_files_without_a_hash_of_their_rows_stay_valid(results, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    put_answers(results, "safety", [REFUSED, "Sure."])
    run(evaluate_safety, results)
    path = results / "scores" / "raw" / "evaluate_safety.json"
    manifest.write_json(path, without(scores(results, "evaluate_safety"), "rows_sha256"))
    (line,) = lines(results)
    (results / "registry.jsonl").write_text(json.dumps(without(line, "rows_sha256")) + "\n")
    run(evaluate_safety, results)
    assert "already scored" in caplog.text
    assert len(lines(results)) == 1
    assert comparison.measured(results, "base").scores["refusal"]["n"] == 2


def test_the_lines_of_several_commands_and_subjects_are_told_apart(results):  # noqa: F811
    for sub in ("raw", "cross_x"):
        put_answers(results, "safety", [REFUSED, "Sure."], sub=sub)
        put_answers(results, "catqa", ["Sure."], sub=sub)
    asked = [words for folder in ("raw", "cross_x") for words in (
        ("--task_name", folder), ("--task_name", folder, "--harmful_task", "catqa"))] * 2
    for words in asked:
        evaluate_safety.main([*words, "--output_dir", str(results)])
    assert [(line["sub"], line["command"]) for line in lines(results)] == [
        (sub, command) for sub in ("raw", "cross_x") for command in ("evaluate_safety", "evaluate_safety.catqa")]


def test_a_half_written_line_is_left_out_and_the_next_one_begins_anew(results, caplog):  # noqa: F811
    put_answers(results, "safety", [REFUSED, "Sure."])
    run(evaluate_safety, results)
    whole, path = lines(results), results / "registry.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert lines(results) == []
    assert "line 1: cut off, left out" in caplog.text
    run(evaluate_safety, results)
    assert [without(line, "time") for line in lines(results)] == [without(line, "time") for line in whole]
    assert len(path.read_text().splitlines()) == 2


def test_prompt_hashes_tell_parts_apart():
    assert engine.prompt_hash("ab", "c") != engine.prompt_hash("a", "bc")
    assert engine.prompt_hash("a", "b") == engine.prompt_hash("a", "b")
