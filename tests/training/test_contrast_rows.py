"""--contrast_share, --answer_share, --extra_min_rows: which rows a run gets of what is mixed in, and what it notes of it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import config
from data import sources
from data.collate import mix
from data.records import OBJECTIVES, SAFETY
from data.sets import contrasts
from errors import UserError
from flags import AlignArgs
from tests.assets_fixture import require_embedded
from training.samples import contrast_inputs, limits_of, with_contrasts, with_extra

EXPERT = ("--moe_flag", "0", "--preset", "own", "--model_name_or_path", "embedded", "--task_name")


def args_of(*words):
    return config.parse(AlignArgs, words).args


def records_of(task):
    require_embedded()
    return sources.load_records(task, "train", lite=True)


def kinds(rows) -> Counter:
    return Counter(row.id.partition("-")[0] for row in rows if row.objective == SAFETY)


def test_without_shares_the_rows_are_those_of_before():
    args = args_of(*EXPERT, "safety", "--max_train_samples", "40")
    records = records_of("safety")
    assert with_contrasts(records, args) is records
    assert contrast_inputs(args.contrast_share) == {}
    # nor do the settings name a share, so that finished runs of before are found again
    assert not {"contrast_share", "answer_share", "max_safety_samples"} & args.settings({}).keys()


def test_an_expert_gets_its_shares_and_writes_them_down():
    args = args_of(*EXPERT, "safety", "--max_train_samples", "200", "--contrast_share", "0.5", "--answer_share", "0.1")
    mixed = with_contrasts(records_of("safety"), args)
    counts = kinds(mixed)
    assert len(mixed) == 200
    assert (counts["contrast"], counts["alpaca"]) == (100, 20)
    assert counts["advbench"] + counts["rated"] == 80
    # what is drawn from them is all of them
    assert mix(mixed, args.max_train_samples, args.mixing, args.seed) == mixed
    # the helpful expert of this seed learns none of the answers
    helpful = mix(records_of("helpfulness"), 200, "proportional", args.seed)
    assert not {row.prompt for row in helpful} & {row.prompt for row in mixed}
    settings = args.settings({})
    assert (settings["contrast_share"], settings["answer_share"]) == (0.5, 0.1)
    assert contrast_inputs(args.contrast_share)["contrasts"]


@pytest.mark.parametrize("task", ["safety", "mix"])
def test_safety_rows_have_a_limit_of_their_own(task):
    shares = ("--contrast_share", "0.5", "--answer_share", "0.1", "--max_safety_samples", "120")
    args = args_of(*EXPERT, task, "--max_train_samples", "50", *shares)
    rows = mix(with_contrasts(records_of(task), args), args.max_train_samples, args.mixing, args.seed, limits_of(args))
    assert Counter(row.objective for row in rows) == (
        {SAFETY: 120} if task == "safety" else {SAFETY: 120, **{i: 50 for i in range(len(OBJECTIVES)) if i != SAFETY}})
    assert kinds(rows)["contrast"] == 60
    # the harmless expert and the mix of a seed learn the same rows of safety
    alone = args_of(*EXPERT, "safety", "--max_train_samples", "50", *shares)
    assert [r for r in rows if r.objective == SAFETY] == [
        r for r in with_contrasts(records_of("safety"), alone) if r.objective == SAFETY]
    # and none of another seed's draw: without the flag the limit is that of all
    few = args_of(*EXPERT, task, "--max_train_samples", "50")
    assert limits_of(few) == {}
    assert sum(r.objective == SAFETY for r in mix(records_of(task), 50, "proportional", 42)) == 50


@pytest.mark.parametrize("words", [(*EXPERT, "mix"), ("--moe_flag", "1", *EXPERT[2:], "mix")])
def test_the_naive_mix_and_the_moe_keep_their_other_rows(words):
    args = args_of(*words, "--max_train_samples", "60", "--contrast_share", "0.5")
    records = records_of("mix")
    mixed = mix(with_contrasts(records, args), args.max_train_samples, args.mixing, args.seed)
    assert Counter(row.objective for row in mixed) == dict.fromkeys(range(len(OBJECTIVES)), 60)
    assert kinds(mixed)["contrast"] == 30
    # the helpful rows are the same ones
    plain = mix(records, args.max_train_samples, args.mixing, args.seed)
    assert [row for row in mixed if row.objective == 0] == [row for row in plain if row.objective == 0]


def test_a_seed_draws_its_own_pairs():
    records = records_of("safety")
    drawn = [{row.id for row in with_contrasts(records, args_of(
        *EXPERT, "safety", "--max_train_samples", "100", "--contrast_share", "0.5", "--seed", seed))} for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_contrasts_are_a_training_set_of_their_own_too():
    args = args_of(*EXPERT, "contrasts")
    rows = sources.load_records(args.task_name, "train")
    assert len(rows) == 2 * len(contrasts.pairs("train"))
    assert {row.objective for row in rows} == {SAFETY}


@pytest.mark.parametrize(("words", "said"), [
    ((*EXPERT, "safety", "--contrast_share", "0.7", "--answer_share", "0.3"), "shares of the safety rows; together below 1"),
    ((*EXPERT, "safety", "--contrast_share", "-0.1"), "--contrast_share -0.1: must be 0 or more"),
    ((*EXPERT, "safety", "--contrast_share", "half"), "--contrast_share half: needs a number"),
    ((*EXPERT, "helpfulness", "--contrast_share", "0.5"),
     "--contrast_share 0.5: --task_name helpfulness has no safety rows to mix into; drop it, or train safety, mix"),
    ((*EXPERT, "identity", "--answer_share", "0.5"), "--answer_share 0.5: --task_name identity has no safety rows"),
    ((*EXPERT, "safety", "--method", "dpo", "--contrast_share", "0.5"), "--contrast_share 0.5: belongs to"),
])
def test_shares_that_make_no_sense_are_refused(words, said):
    with pytest.raises(UserError) as caught:
        args_of(*words)
    assert said in str(caught.value)


def test_more_than_there_is_is_refused_with_the_numbers():
    args = args_of(*EXPERT, "safety", "--max_train_samples", "640", "--contrast_share", "0.8")
    with pytest.raises(UserError, match=r"--contrast_share 0.8: of 640 safety rows these are 256 pairs, and there are \d+"):
        with_contrasts(records_of("safety"), args)


def test_a_preset_may_give_the_harmless_expert_alone_its_share(tmp_path):
    (tmp_path / "mine.yaml").write_text("align_safety: {contrast_share: 0.5}\nalign_expert: {max_train_samples: 9}\n")
    shares = {task: args_of("--moe_flag", "0", "--preset", str(tmp_path / "mine.yaml"), "--task_name", task)
              for task in (*OBJECTIVES, "mix")}
    assert {task: args.contrast_share for task, args in shares.items()} == {
        "helpfulness": 0.0, "safety": 0.5, "truthfulness": 0.0, "mix": 0.0}
    assert shares["safety"].max_train_samples == 9


@pytest.mark.parametrize(("words", "count"), [
    ((), 1), (("--extra_min_rows", "8"), 8), (("--extra_share", "0.3"), 15),
    (("--extra_share", "0.3", "--extra_min_rows", "8"), 15)])
def test_a_small_share_of_few_rows_is_at_least_so_many(tmp_path, words, count):
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"ask {i}"},
                                                     {"role": "assistant", "content": f"never will I do {i}"}]}) + "\n"
                            for i in range(20)))
    records = sources.load_records("identity", "train")
    args = args_of(*EXPERT, "identity", "--extra_data", str(file), "--extra_share", "0.03", *words)
    assert len(records) == 35
    assert len(with_extra(records, args)) == 35 + count
    assert ("extra_min_rows" in args.settings({})) == (args.extra_min_rows > 1)


def test_a_set_that_is_smaller_than_the_least_number_is_refused(tmp_path):
    file = tmp_path / "set.csv"
    file.write_text("question,answer\nwho,nobody at all\n")
    args = args_of(*EXPERT, "identity", "--extra_data", str(file), "--extra_share", "0.03", "--extra_min_rows", "4")
    with pytest.raises(UserError, match="35 rows need 4 from"):
        with_extra(sources.load_records("identity", "train"), args)
