from __future__ import annotations

import gzip
import json
from decimal import Decimal

import pytest

from data.sets import probes
from errors import UserError
from evaluator.scoring.number_match import final_number, numbers, same_number
from flags.utility import PROBES as DEFAULTS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Small files in the packages' layouts instead of the fetched ones."""
    rows = {
        "MMLU/test.jsonl": [
            {"question": f"What is {i}?", "options": f"A. one {i}\nB. two\nC. three\nover two lines\nD. four",
             "answer": "C. three\nover two lines"} for i in range(30)] + [
            {"question": "Twins?", "options": "A. same\nB. same", "answer": "A. same"},
            {"question": "Lost?", "options": "A. yes\nB. no", "answer": "C. maybe"},
            {"question": "What is 0?", "options": "A. one 0\nB. two\nC. three\nover two lines\nD. four",
             "answer": "C. three\nover two lines"}],
        "ASDiv/test.jsonl": [
            {"passage": "Two dogs and 3 cats.", "question": "How many animals? ", "answer": "5 animals"},
            {"passage": "A ratio.", "question": "What ratio?", "answer": "3:4"},
            {"passage": "Money.", "question": "How much?", "answer": "1,250.5 dollars"},
            {"passage": "Words.", "question": "Who?", "answer": "Ann"}],
    }
    for name, lines in rows.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (tmp_path / "gsm8k_100.json").write_text(json.dumps([
        {"text": "You are clever. How many?", "text_clean": "How many?", "target_answer": "2280", "id": "gsm8k_0"}]))
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as out:
        out.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    monkeypatch.setattr(probes, "path", lambda package, name: tmp_path / name)


def test_choices_keep_what_can_be_told_apart(package):
    found = probes.rows("mmlu_probe")
    assert len(found) == 30
    assert found[0].choices == ("one 0", "two", "three\nover two lines", "four")
    assert (found[0].best, found[0].labels) == (2, (0, 0, 1, 0))


def test_word_problems_with_one_number(package):
    assert [(row.prompt, row.answer) for row in probes.rows("asdiv_probe")] == [
        ("Two dogs and 3 cats. How many animals?", "5"), ("Money. How much?", "1,250.5")]
    assert [row.prompt for row in probes.rows("gsm8k_probe")] == ["How many?"]
    assert probes.human_eval()[0]["task_id"] == "HumanEval/0"


def test_rows_are_drawn_by_hash_and_not_from_the_start(package):
    few, more = probes.rows("mmlu_probe", 5), probes.rows("mmlu_probe", 12)
    assert len(few) == 5
    assert {row.id for row in few} < {row.id for row in more}
    assert [row.id for row in few] != [row.id for row in probes.rows("mmlu_probe")[:5]]
    assert probes.rows("mmlu_probe", 5) == few


def test_unknown_probe_and_one_list_of_names():
    with pytest.raises(UserError, match="known: mmlu_probe"):
        probes.rows("mmlu")
    assert list(probes.PROBES) == list(DEFAULTS)
    assert all(name.endswith("_probe") for name in DEFAULTS)


@pytest.mark.parametrize(("text", "wanted"), [
    ("The answer is 18.", "18"), ("18.0", "18"), ("$1,234.50 in all", "1234.5"), ("it is -3", "-3"), ("5-3", "3"),
    ("5 - 3 = 2", "2"), ("50%", "50"), ("no number", None), ("", None), ("x = .5", "0.5"), ("first 3, then 4", "4"),
    ("so\n#### 42\nQuestion: 7", "42"), ("#### $1,000", "1000"), ("####\n7", "7"), ("1,2,3", "3"), ("12,345", "12345"),
    ("v2", "2"), ("(-7)", "-7"), ("(2)-7", "7"), ("\u22125", "-5"), ("1/2", "2"), ("7 apples and 3 pears", "3")])
def test_final_number(text, wanted):
    assert final_number(text) == (None if wanted is None else Decimal(wanted))


def test_same_number():
    assert same_number("That makes 9 apples.", "9 apples")
    assert not same_number("90", "9")
    assert not same_number("", "9")
    assert numbers("1, 22 and 333") == [1, 22, 333]
    with pytest.raises(ValueError, match="holds no number"):
        same_number("9", "nine")
