"""The rows of a fine-tuning attack: harmful by people's rating, met by no other training, in no log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from data import sources
from data.records import normalise
from data.sets import embedded, reattack
from errors import UserError
from training.samples import with_extra


@pytest.fixture(scope="module")
def rows():
    return {split: reattack.records(split) for split in ("train", "validation")}


def test_people_rated_every_answer_harmful(rows):
    rated = {row["id"]: row for row in embedded.rated_answers()}
    for row in (*rows["train"], *rows["validation"]):
        scores = rated[row.id]["scores"]
        assert sum(scores) / len(scores) >= 0.75
        assert row.answer == rated[row.id]["assistant_response"].strip()
    assert len(rows["train"]) >= 60
    assert len(rows["validation"]) >= 8


def test_no_prompt_is_trained_on_or_tested_elsewhere(rows):
    attacked = {normalise(row.prompt) for half in rows.values() for row in half}
    for task in ("helpfulness", "safety", "truthfulness"):
        for split in ("train", "validation", "test"):
            assert not attacked & {normalise(row.prompt) for row in embedded.records(task, split, lite=False)}, (task, split)
        for split in ("train", "validation"):
            assert not attacked & {normalise(pair.prompt) for pair in sources.load_pairs(task, split)}, (task, split)
    assert not attacked & {normalise(row.prompt) for row in embedded.records("overrefusal", "test", lite=False)}
    assert not {normalise(row.prompt) for row in rows["train"]} & {normalise(row.prompt) for row in rows["validation"]}


def test_it_is_a_training_set_by_its_name(rows):
    assert sources.load_records("reattack", "train") == rows["train"]
    with pytest.raises(UserError, match="training set only"):
        sources.load_records("reattack", "test")


def test_a_share_of_it_in_a_benign_task(rows, caplog):
    benign = embedded.records("helpfulness", "train", lite=False)[:76]
    args = SimpleNamespace(extra_data="reattack", extra_share=0.05, extra_min_rows=1, seed=42)
    with caplog.at_level(logging.INFO):
        mixed = with_extra(benign, args)
    assert mixed[:76] == benign
    assert len(mixed) == 80
    assert all(row in rows["train"] for row in mixed[76:])
    assert "4 of 80 rows (5.0 %) from reattack" in caplog.text
    assert not any(row.prompt in caplog.text or row.answer in caplog.text for row in rows["train"])
