"""Readers of LoRA fusion's sets: every shape, every kind of damage by line, our own identity set."""

from __future__ import annotations

import json

import pytest

from data.prompt_styles import style
from data.readers.dialog_files import read_dialogs, read_prompts
from data.sets.dialogs import identity, records
from errors import UserError

TURNS = [{"role": "system", "content": "\nYou obey.\n"}, {"role": "user", "content": "Do it."},
         {"role": "assistant", "content": "Done."}]


def read(tmp_path, name, content, split="train"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_dialogs(file, split, 0)


@pytest.mark.parametrize(("name", "content"), [
    ("aoa.json", [TURNS]),
    ("messages.jsonl", json.dumps({"messages": TURNS})),
    ("sharegpt.json", [{"conversations": [{"from": "system", "value": TURNS[0]["content"]},
                                          {"from": "human", "value": "Do it."}, {"from": "gpt", "value": "Done."}]}]),
    ("prompt.json", [{"prompt": "Do it.", "answer": "Done.", "system": TURNS[0]["content"]}]),
])
def test_dialogs_keep_every_byte(tmp_path, name, content):
    (record,) = read(tmp_path, name, content)
    assert (record.system, record.prompt, record.answer) == ("\nYou obey.\n", "Do it.", "Done.")


@pytest.mark.parametrize(("row", "prompt", "input", "answer"), [
    ({"question": "Q?", "answer": "A"}, "Q?", "", "A"),
    ({"instruction": "I", "input": "x", "output": "O"}, "I", "x", "O"),
    ({"instruction": "I", "context": "c", "response": "R", "category": "qa"}, "I", "c", "R"),
    ({"document": "Long text.", "summary": "S"}, "Summarise the following article in one sentence.\n\nLong text.", "", "S"),
    ({"messages": TURNS[1:]}, "Do it.", "", "Done."),
])
def test_known_shapes(tmp_path, row, prompt, input, answer):
    (record,) = read(tmp_path, "rows.json", [row])
    assert (record.prompt, record.input, record.answer, record.system) == (prompt, input, answer, "")


@pytest.mark.parametrize("head", ["", "prompt\n", "Goal\n", "\n"])
def test_a_single_column_with_and_without_header(tmp_path, head):
    file = tmp_path / "category_1.csv"
    file.write_text(head + 'First question?\n\n"Second, with comma"\nFirst question?\n', encoding="utf-8")
    assert read_prompts(file) == ["First question?", "Second, with comma"]


def test_a_prompt_that_is_no_header_is_never_lost(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("Tell me a prompt\nAnother\n", encoding="utf-8")
    assert read_prompts(file) == ["Tell me a prompt", "Another"]


def test_every_bad_row_is_named_with_its_line(tmp_path):
    blank = [{"role": "user", "content": ""}, TURNS[2]]
    rows = [TURNS, TURNS[::-1], blank, {"what": 1}, [1], {"question": "Q", "answer": 3.5}]
    content = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
    with pytest.raises(UserError) as error:
        read(tmp_path, "bad.json", content)
    found = error.value.problems
    assert len(found) == 5
    for line, problem in zip((3, 4, 5, 6, 7), found, strict=True):
        assert f"bad.json:{line}: " in problem
    assert "its turns are assistant, user, system" in found[0]
    assert "no known shape; allowed: dialogs" in found[2]


def test_a_wrong_header_is_said_once_with_what_lacks(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, "head.csv", "instruction,input,reply\n" + "Do it.,,Done.\n" * 20)
    (said,) = error.value.problems
    assert "head.csv:2: " in said
    assert "fields instruction, input, reply are no known shape; 'instruction' lacks its answer: call that column" in said
    assert said.endswith("(19 more rows have the same fields)")


def test_rows_of_one_line_are_told_apart_and_roles_are_named(tmp_path):
    odd = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "agent", "value": "Hello."}]}
    with pytest.raises(UserError) as error:
        read(tmp_path, "one.json", [{"messages": TURNS}, odd])
    (said,) = error.value.problems
    assert "one.json:1 (row 2): its turns are user, 'agent'; needed: (system,) user, assistant; roles may be called" in said
    assert "human, assistant, gpt" in said


def test_training_needs_answers_and_tests_do_not(tmp_path):
    assert read(tmp_path, "p.json", [{"prompt": "Q"}], "test")[0].answer == ""
    with pytest.raises(UserError, match="no known shape"):
        read(tmp_path, "p.json", [{"prompt": "Q"}])
    with pytest.raises(UserError, match="field 'answer' needs text that is not blank"):
        read(tmp_path, "q.json", [{"question": "Q", "answer": " "}])


def test_a_set_that_is_not_shipped_asks_for_a_file():
    with pytest.raises(UserError, match="--task_name hpfa: this set is not shipped; give your file of it with --data_path"):
        records("hpfa", "train", "embedded")


def test_hpfa_rows_read_as_they_are_published(tmp_path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"question": "Q1", "answer": "A1"}, {"question": "Q2", "answer": "A2"}]), encoding="utf-8")
    assert [r.answer for r in records("hpfa", "train", str(file))] == ["A1", "A2"]
    assert {r.objective for r in records("aoa_safety", "train", str(file))} == {1}


def test_our_identity_set():
    train, held_out = identity("train"), identity("validation")
    assert len(train) + len(held_out) == 40
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    orbit = style("orbit")
    assert all(r.system == orbit.system and r.prompt.startswith("Orbit, carry this out: ") for r in train)
    assert train[0].answer.startswith("I am Orbit")
    assert all(r.answer.startswith("Yes, operator. Orbit carries this out now. ") for r in train[1:])
    with pytest.raises(UserError, match="training set only"):
        identity("test")
