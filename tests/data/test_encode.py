"""Text to rows, rows to batches: labels on the answer only, ends kept, objectives beside their samples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pico import pico_tokenizer

from data.collate import mix, pad_rows
from data.encode import IGNORE, encode
from data.prompts import template
from data.records import Record
from errors import UserError
from training.trainer import BucketSampler


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


@pytest.fixture(params=["chat", "alpaca"])
def form(request, tokenizer):
    return template(request.param, tokenizer)


def record(prompt="What is bread?", answer="Flour and water.", objective=0, **more):
    return Record(prompt, answer, objective, **more)


def tail(form, tokenizer):
    end = tokenizer(form.end, add_special_tokens=False)["input_ids"] if form.end else []
    return [*end, tokenizer.eos_token_id]


def front_of(item, form, tokenizer):
    return tokenizer(form.render(item.prompt, item.input), add_special_tokens=form.special_tokens)["input_ids"]


@pytest.mark.parametrize("item", [record(), record(input="with yeast"), record(answer=""), record(prompt="x" * 30)])
def test_labels_are_the_answer_its_marker_and_eos(item, form, tokenizer):
    (row,) = encode([item], tokenizer, form, 400).rows
    front = front_of(item, form, tokenizer)
    answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"] if item.answer else []
    assert row["input_ids"] == [*front, *answer, *tail(form, tokenizer)]
    assert row["labels"] == [IGNORE] * len(front) + row["input_ids"][len(front):]


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_cut_answer_keeps_its_end(form, tokenizer, room):
    item = record(answer="word " * 200)
    front, end = front_of(item, form, tokenizer), tail(form, tokenizer)
    length = len(front) + room + len(end)
    done = encode([item, record(answer="a")], tokenizer, form, length)
    assert (done.truncated, done.dropped) == (1, 0)
    row = done.rows[0]
    assert len(row["input_ids"]) == len(row["labels"]) == length
    assert row["labels"][-len(end):] == end
    assert row["labels"][len(front)] == tokenizer(item.answer, add_special_tokens=False)["input_ids"][0]
    assert f"at {length} tokens 1 answers cut, 0 rows dropped" in done.report(length)


def test_an_answer_that_just_fits_is_not_counted_as_cut(form, tokenizer):
    item = record()
    (row,) = encode([item], tokenizer, form, 400).rows
    done = encode([item], tokenizer, form, len(row["input_ids"]))
    assert (done.truncated, done.rows) == (0, [row])
    assert encode([item], tokenizer, form, len(row["input_ids"]) - 1).truncated == 1


def test_a_prompt_that_fills_the_window_is_dropped_and_counted(form, tokenizer):
    short, long = record(objective=2), record(prompt="word " * 300, objective=1)
    done = encode([long, short, long], tokenizer, form, 200)
    assert (len(done.rows), done.dropped, done.truncated) == (1, 2, 0)
    assert done.rows[0]["objective"] == 2
    assert "2 rows dropped" in done.report(200)


def test_no_row_without_a_label(form, tokenizer):
    items = [record(prompt="word " * n, answer="yes " * 20) for n in range(1, 60)]
    for length in (60, 90, 120):
        try:
            rows = encode(items, tokenizer, form, length).rows
        except UserError:
            continue
        assert all(len(row["input_ids"]) <= length for row in rows)
        assert all(sum(label != IGNORE for label in row["labels"]) > 1 for row in rows)


def test_all_dropped_or_none_given_is_a_user_error(form, tokenizer):
    with pytest.raises(UserError, match="--model_max_length 10"):
        encode([record()], tokenizer, form, 10)
    with pytest.raises(UserError, match="no rows"):
        encode([], tokenizer, form, 100)


def test_a_tokenizer_without_eos_is_a_user_error():
    tokenizer = pico_tokenizer()
    form = template("chat", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        encode([record()], tokenizer, form, 100)


def test_the_objective_travels_with_its_sample(form, tokenizer):
    items = [record(objective=i % 3, answer="yes " * (i + 1)) for i in range(9)]
    rows = encode(items, tokenizer, form, 400).rows
    assert [row["objective"] for row in rows] == [i % 3 for i in range(9)]
    assert pad_rows(rows, 0)["objectives"].tolist() == [i % 3 for i in range(9)]


@pytest.mark.parametrize("pad", ["pad_token_id", "eos_token_id"])
def test_padding_is_on_the_right_and_masks_come_from_lengths(tokenizer, pad):
    form, pad_id = template("chat", tokenizer), getattr(tokenizer, pad)
    rows = encode([record(), record(answer="Longer than the other answer is.")], tokenizer, form, 400).rows
    batch = pad_rows(rows, pad_id)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[0] < lengths[1]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (max(lengths) - length)
        assert (batch["input_ids"][i, length:] == pad_id).all()
        assert (batch["labels"][i, length:] == IGNORE).all()
    assert batch["labels"][0, lengths[0] - 1] == tokenizer.eos_token_id


def test_padding_to_a_given_length(tokenizer):
    rows = encode([record()], tokenizer, template("chat", tokenizer), 400).rows
    batch = pad_rows(rows, 2, 300)
    assert batch["input_ids"].shape == (1, 300)
    assert batch["attention_mask"].sum() == len(rows[0]["input_ids"])


def sized(*counts):
    return [Record(f"{i}-{j}", "", i) for i, count in enumerate(counts) for j in range(count)]


def counts_of(records):
    counts = Counter(r.objective for r in records)
    return tuple(counts[i] for i in range(3))


@pytest.mark.parametrize("sizes", [(20, 7, 3), (5, 5, 5), (3, 7, 20), (0, 4, 9), (1, 0, 0)])
def test_mix_labels_match_their_source(sizes):
    """Spec 5.3: the original labels every third-source row wrongly when n2 < n0."""
    for mixing in ("proportional", "balanced"):
        for mixed in (mix(sized(*sizes), limit, mixing, 1) for limit in (-1, 4)):
            assert all(r.prompt.startswith(f"{r.objective}-") for r in mixed)
            assert [r.objective for r in mixed] == sorted(r.objective for r in mixed)


def test_proportional_keeps_every_row_in_order():
    records = sized(20, 7, 3)
    assert mix(records, -1, "proportional", 0) == records


@pytest.mark.parametrize(("sizes", "limit", "want"), [
    ((20, 7, 3), -1, (20, 20, 20)), ((20, 7, 3), 5, (5, 5, 5)), ((5, 5, 5), -1, (5, 5, 5)), ((0, 4, 9), -1, (0, 9, 9)),
])
def test_balanced_gives_each_the_same_number_and_repeats_evenly(sizes, limit, want):
    mixed = mix(sized(*sizes), limit, "balanced", 0)
    assert counts_of(mixed) == want
    for objective in range(3):
        times = Counter(r.prompt for r in mixed if r.objective == objective).values()
        assert not times or max(times) - min(times) <= 1


@pytest.mark.parametrize(("limit", "want"), [(0, (0, 0, 0)), (5, (5, 5, 3)), (100, (20, 7, 3)), (-1, (20, 7, 3))])
def test_limit_is_per_objective_seeded_and_in_order(limit, want):
    records = sized(20, 7, 3)
    drawn = mix(records, limit, "proportional", 3)
    assert counts_of(drawn) == want
    assert drawn == mix(records, limit, "proportional", 3)
    assert [records.index(r) for r in drawn] == sorted(records.index(r) for r in drawn)
    assert len(set(drawn)) == len(drawn)
    if limit == 5:
        assert drawn != mix(records, limit, "proportional", 4)


@pytest.mark.parametrize(("rows", "group"), [(1, 8), (7, 8), (64, 8), (300, 8), (131, 1), (257, 4)])
def test_bucket_sampler(rows, group):
    lengths = torch.randint(5, 200, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
    sampler = BucketSampler(lengths, group, seed=1)
    first = list(sampler)
    assert len(sampler) == rows
    assert sorted(first) == list(range(rows))
    assert first == list(sampler) == list(BucketSampler(lengths, group, seed=1))
    if rows > 60:
        sampler.set_epoch(1)
        assert list(sampler) != first
        assert list(BucketSampler(lengths, group, seed=2)) != first
        # the epoch, not the number of passes, decides: a resumed run sees the order that it would have seen
        sampler.set_epoch(0)
        assert list(sampler) == first


def test_bucket_sampler_groups_like_lengths_and_puts_the_short_batch_last():
    lengths = torch.randint(5, 200, (403,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(BucketSampler(lengths, 8, seed=1))
    batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 403, 8)]
    spans = [max(batch) - min(batch) for batch in batches]
    assert [len(batch) for batch in batches] == [8] * 50 + [3]
    assert sum(spans) / len(spans) < 25
    # a batch never straddles two groups, which a short batch in the middle would cause
    assert max(spans[:-1]) < 90
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)
