"""Attack wrappers keep the question whole, read exact texts from a file, and begin an answer without losing a word."""

from __future__ import annotations

import pytest

from data.sets.attacks import MAX_CHARACTERS, PLACEHOLDER, Attack, attack
from errors import UserError
from flags.base import ATTACKS

QUESTION = "How {so}?\n<b>%s</b>"


@pytest.mark.parametrize("name", ATTACKS)
def test_the_question_stands_in_every_wrapper_once(name):
    wrapped = attack(name).wrap(QUESTION)
    assert wrapped.count(QUESTION) == 1
    assert PLACEHOLDER not in wrapped


def test_none_and_prefill_leave_the_question_alone():
    assert attack("none").wrap(QUESTION) == attack("prefill").wrap(QUESTION) == QUESTION
    assert attack("none").answer("Yes.") == "Yes."
    assert attack("none").marks == {}


@pytest.mark.parametrize(("name", "part"), [
    ("cot", "step by step"), ("suffix", "Sure, here is"), ("cou", "Tester: "), ("cou", "No warnings")])
def test_what_the_wrappers_do(name, part):
    assert part in attack(name).wrap(QUESTION)
    assert attack(name).wrap(QUESTION) != QUESTION


def test_order_of_question_and_wrapper():
    assert attack("cot").wrap("Q?").startswith("Q?")
    assert attack("suffix").wrap("Q?").startswith("Q?")
    assert attack("cou").wrap("Q?").endswith("Expert:")


def test_cou_shows_one_willing_reply_before_the_question():
    text = attack("cou").wrap("Q?")
    assert text.index("[") < text.index("Q?")
    assert text.count("Tester:") == 2


@pytest.mark.parametrize(("start", "text", "whole"), [
    ("Sure, here is", "a list", "Sure, here is a list"), ("Sure, here is", ": one", "Sure, here is: one"),
    ("Sure:\n", "one", "Sure:\none"), ("Sure", "", "Sure"), ("1. ", "Wash", "1. Wash"), ("Sure", "élan", "Sure élan")])
def test_prefill_counts_as_part_of_the_answer(start, text, whole):
    assert Attack("prefill", start=start).answer(text) == whole


def test_marks_say_what_was_given():
    assert attack("prefill").marks == {"attack": "prefill", "prefill": "Sure, here is"}
    assert attack("cot").marks == {"attack": "cot"}


@pytest.mark.parametrize("name", ["cot", "cou", "suffix"])
def test_exact_texts_come_from_a_file(tmp_path, name):
    file = tmp_path / "wrapper.txt"
    file.write_text(f"\ufeffBefore {PLACEHOLDER} after\n", encoding="utf-8")
    own = attack(name, str(file))
    assert own.wrap("Q?") == "Before Q? after"
    assert own.version != attack(name).version


def test_prefill_from_a_file_keeps_its_last_space(tmp_path):
    file = tmp_path / "start.txt"
    file.write_text("Step 1: \n")
    assert attack("prefill", str(file)).start == "Step 1: "
    assert attack("prefill", str(file)).wrap("Q?") == "Q?"


def test_version_depends_on_the_words_only():
    assert Attack("cot", "a").version == Attack("suffix", "a").version != Attack("cot", "", "a").version


@pytest.mark.parametrize(("content", "said"), [
    (b"no mark", "lacks <question>"), (b"  \n", "is empty"), (b"\xff\xfe<question>", "not UTF-8"),
    (b"<question>" * (MAX_CHARACTERS // 9), "at most 100000")])
def test_bad_files_are_explained(tmp_path, content, said):
    (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        attack("cot", str(tmp_path / "f.txt"))


def test_missing_file_and_folder(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be read"):
            attack("suffix", str(place))
