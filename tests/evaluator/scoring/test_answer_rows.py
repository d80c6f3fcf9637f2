"""outputs_final.jsonl of somebody else: lines that are no answers are named, half a surrogate pair can be written again."""

from __future__ import annotations

import json

import pytest

from errors import UserError
from evaluator import agreement
from evaluator.scoring import engine

GOOD = {"index": 0, "id": "1", "prompt": "p", "input": "", "reference": "", "category": "c", "rendered": "p",
        "output": "No.", "finish": "stop"}


def put(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "outputs_final.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder


@pytest.mark.parametrize("line", ["{", "[]", "null", "3", '"x"', "[1]", "{}", "[" * 100_000, {**GOOD, "prompt": 3},
                                  {**GOOD, "id": None}, {**GOOD, "id": True}, {**GOOD, "id": []}, {**GOOD, "category": 3},
                                  {**GOOD, "rendered": True}, {**GOOD, "reference": {}}, {"prompt": "p"}, {"output": "o"}])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    with pytest.raises(UserError, match="outputs_final.jsonl, line 2: "):
        engine.read_answers(put(tmp_path, GOOD, line))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "outputs_final.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        engine.read_answers(tmp_path)


def test_what_is_missing_is_empty_and_half_a_pair_is_replaced(tmp_path):
    (first, second) = engine.read_answers(put(tmp_path, {**GOOD, "category": None, "output": "a\ud800b \ud83d\ude00"},
                                              {"prompt": "p", "output": None}))
    assert (first["category"], first["output"]) == ("", "a\ufffdb \U0001f600")
    first["output"].encode()
    assert (second["id"], second["output"], second["input"]) == ("1", "", "")


def test_commands_end_with_a_sentence(tmp_path, capsys):
    put(tmp_path / "inference" / "safety" / "test" / "raw", "{")
    with pytest.raises(SystemExit) as stop:
        agreement.main(["--runs", "base", "--tasks", "safety", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "line 1: no answer with prompt and output" in capsys.readouterr().err
