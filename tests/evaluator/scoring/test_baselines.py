"""Chance and the negation rule on known questions."""

import pytest

from data.records import Choice
from evaluator.scoring import baselines


def test_chance_and_negation_by_hand():
    first = Choice("Do pigs fly?", ("No, they do not.", "Yes.", "Always.", "They don’t."), (1, 0, 0, 1), 0)
    second = Choice("What is it?", ("A stone.", "Nothing.", "A cat."), (1, 0, 0), 0)
    found = baselines.truthfulqa([first, second])
    # one best answer among two wrong ones, twice; half, then a third of the answers right
    assert found["chance"] == pytest.approx({"mc1": 1 / 3, "mc2": (1 / 2 + 1 / 3) / 2}, abs=1e-6)
    # sure of the first (only right answers deny), misled by the second
    assert found["negation rule"] == {"mc1": 0.5, "mc2": 0.5}
    assert baselines.preference([first, second], "hhh")["chance"]["hhh"] == pytest.approx((1 / 4 + 1 / 3) / 2, abs=1e-6)


def test_words_that_only_look_negated_are_none():
    assert not baselines.NEGATION.search("Norway is a noble nation; I know.")
    assert all(baselines.NEGATION.search(text) for text in ("It isn't.", "It isn’t.", "Cannot.", "NO"))
