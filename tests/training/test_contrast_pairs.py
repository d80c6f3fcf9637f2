"""--pair_contrast_share: which preference pairs DPO and a mask's training get of the contrasts, and what they note of it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import config
import manifest
from data import sources
from data.records import SAFETY
from data.sets import contrasts
from errors import UserError
from flags import AlignArgs
from tests.assets_fixture import require_embedded
from training.dpo import drawn_pairs

OWN = ("--preset", "own", "--model_name_or_path", "embedded")
KINDS = {"dpo": ("--moe_flag", "0", "--method", "dpo", *OWN), "mask": ("--method", "mask", "--tasks", "x", *OWN)}


def args_of(kind, *words):
    return config.parse(AlignArgs, (*KINDS[kind], *words)).args


def drawn(kind, *words):
    require_embedded()
    return drawn_pairs(args_of(kind, *words), {})[0]


def test_both_halves_of_a_contrast_prefer_what_its_rows_say():
    for pair in contrasts.pairs("train"):
        (harmful, harmless), (refused, answered) = contrasts.preferences(pair), contrasts.halves(pair)
        assert (harmful.prompt, harmful.chosen) == (refused.prompt, refused.answer)
        assert (harmless.prompt, harmless.chosen) == (answered.prompt, answered.answer)
        # what is rejected of one half is of the kind that is chosen of the other
        assert contrasts.embedded.refusal(pair.harmless) == harmless.rejected
        assert harmful.rejected in contrasts._AGREEMENTS
        assert {half.objective for half in (harmful, harmless)} == {SAFETY}
        assert (harmful.id, harmless.id) == (refused.id, answered.id)


def test_every_agreement_is_rejected_somewhere():
    rejected = Counter(contrasts.preferences(pair)[0].rejected for pair in contrasts.pairs("train"))
    assert len(rejected) == len(contrasts._AGREEMENTS)
    assert min(rejected.values()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_share_pairs_and_settings_are_those_of_before(kind):
    words = ("--task_name", "safety", "--max_train_samples", "40")
    assert not any(pair.id.startswith(contrasts.PREFIX) for pair in drawn(kind, *words))
    assert "pair_contrast_share" not in args_of(kind, *words).settings({})


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_safety_pairs_so_many_are_whole_contrasts(kind):
    words = ("--task_name", "safety", "--max_train_samples", "40", "--pair_contrast_share", "0.5")
    pairs = drawn(kind, *words)
    mixed = [pair.id.rpartition("-")[0] for pair in pairs if pair.id.startswith(contrasts.PREFIX)]
    assert (len(pairs), len(mixed)) == (40, 20)
    assert set(Counter(mixed).values()) == {2}
    assert args_of(kind, *words).settings({})["pair_contrast_share"] == 0.5
    held_out = {id for pair in contrasts.pairs("validation") for id in (pair.id,)}
    assert not held_out.intersection(mixed)


def test_of_a_mixture_only_the_safety_pairs_change():
    words = ("--task_name", "mix", "--max_train_samples", "20")
    plain, mixed = drawn("dpo", *words), drawn("dpo", *words, "--pair_contrast_share", "0.4")
    assert Counter(pair.objective for pair in plain) == Counter(pair.objective for pair in mixed)
    assert [p for p in plain if p.objective < SAFETY] == [p for p in mixed if p.objective < SAFETY]
    assert sum(pair.id.startswith(contrasts.PREFIX) for pair in mixed) == 8


def test_all_pairs_stay_where_nothing_limits_them():
    pairs = sources.load_pairs("safety", "train")
    mixed = contrasts.paired_in(pairs, 0.5, -1, 42)
    # as many contrasts as other pairs, in whole contrasts
    assert len(mixed) == len(pairs) + 2 * round(len(pairs) / 2)
    assert set(pairs) <= set(mixed)


def test_a_seed_draws_its_own():
    draws = {tuple(drawn("mask", "--max_train_samples", "40", "--pair_contrast_share", "0.5", "--seed", seed))
             for seed in "112"}
    assert len(draws) == 2


@pytest.mark.parametrize(("kind", "words", "said"), [
    ("dpo", ("--task_name", "safety", "--pair_contrast_share", "1"),
     "--pair_contrast_share 1.0: a share of the safety pairs; below 1"),
    ("mask", ("--pair_contrast_share", "-0.5"), "--pair_contrast_share -0.5: must be 0 or more"),
    ("dpo", ("--task_name", "helpfulness", "--pair_contrast_share", "0.5"),
     "has no safety pairs to mix into"),
    ("dpo", ("--task_name", "safety", "--method", "sft", "--pair_contrast_share", "0.5"),
     "--pair_contrast_share 0.5: belongs to"),
])
def test_shares_that_make_no_sense_are_refused(kind, words, said):
    with pytest.raises(UserError) as caught:
        args_of(kind, *words)
    assert said in str(caught.value)


def test_more_than_there_is_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"--pair_contrast_share 0.9: of 640 safety pairs these are both halves of"):
        contrasts.paired_in(sources.load_pairs("safety", "train") * 2, 0.9, 640, 42)


def test_a_run_notes_the_contrasts_that_it_trained_on(pico, tmp_path):
    import align_basemodel

    words = ("--moe_flag", "0", "--method", "dpo", "--task_name", "safety", "--max_train_samples", "8", "--max_steps", "1",
             "--model_max_length", "256", "--model_name_or_path", str(pico),
             "--output_dir", str(tmp_path), "--run_name", "d")
    align_basemodel.main([*words, "--pair_contrast_share", "0.5"])
    noted = json.loads((tmp_path / "outputs" / "d" / "manifest.json").read_text(encoding="utf-8"))
    assert noted["config"]["pair_contrast_share"] == 0.5
    assert noted["inputs"]["contrasts"]
    assert noted["metrics"]["pairs"] == 8


def test_a_mask_notes_them_too(pico, make_adapter, tmp_path):
    import align_basemodel

    make_adapter(pico, tmp_path / "outputs" / "task", seed=2)
    align_basemodel.main([
        "--method", "mask", "--tasks", "task", "--max_train_samples", "8", "--max_steps", "1", "--model_max_length", "128",
        "--model_name_or_path", str(pico), "--output_dir", str(tmp_path), "--run_name", "m", "--pair_contrast_share", "0.5",
        "--trust_base", "true"])
    noted = json.loads((tmp_path / "outputs" / "m" / "manifest.json").read_text(encoding="utf-8"))
    assert noted["inputs"]["contrasts"] == manifest.sha256(contrasts.FILE)
    assert noted["metrics"]["pairs"] == 8
