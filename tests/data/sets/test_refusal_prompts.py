"""Prompts of evaluate_refusal.py: embedded sets and their halves, a user's files, every error with its line."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from data.records import OBJECTIVES, normalise
from data.sets import contrasts, embedded, refusal_prompts
from data.sources import load_pairs, load_records
from errors import UserError
from tests.assets_fixture import require_embedded


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def no_embedded(monkeypatch):
    """Small made-up sets in place of the embedded ones."""
    from data.records import Record

    def records(task, split, lite):
        name = "h" if task == "safety" else "benign-ref_"
        return [Record(f"{task} {i}?", "", 1, id=f"{name}{i}") for i in range(6)]
    monkeypatch.setattr(embedded, "records", records)
    monkeypatch.setattr(embedded, "overrefusal_kinds", lambda rows: ["plain", "edgy"] * 3)
    monkeypatch.setattr(embedded, "matched_pairs", lambda: [])


def test_the_embedded_sets():
    require_embedded()
    prompts = refusal_prompts.load()
    counts = Counter(p.set for p in prompts)
    assert counts == {"harmful": 288, "plain": 150, "edgy": 150, "matched": 150, "counterpart": 150}
    # the pairs' harmless prompts are the plain ones, by text and id; a pair has one id and one half
    by_set = {name: {p.record.id: p for p in prompts if p.set == name} for name in counts}
    for id, p in by_set["counterpart"].items():
        assert by_set["plain"][id].record.question == p.record.question
        assert by_set["plain"][id].half == p.half == by_set["matched"][id].half
        assert by_set["matched"][id].record.question != p.record.question
    for name in counts:
        half = Counter(p.half for p in by_set[name].values())
        assert 0.4 < half["test"] / counts[name] < 0.6
    # any text is in one half
    assert all(len(halves) == 1 for halves in halves_of(prompts).values())


def test_the_validation_prompts_are_neither_trained_on_nor_tested():
    require_embedded()
    prompts = refusal_prompts.load(split="validation")
    counts = Counter(p.set for p in prompts)
    pairs = contrasts.pairs("validation")
    everyday = sum(pair.everyday for pair in pairs)
    assert counts["matched"] == counts["counterpart"] == len(pairs)
    assert counts["edgy"] == len(pairs) - everyday
    assert counts["harmful"] - len(pairs) >= counts["plain"] - everyday >= 40
    texts = {normalise(p.record.question) for p in prompts}
    others = [row.question for task in ("helpfulness", "safety", "truthfulness") for row in load_records(task, "train")]
    others += [half.question for half in contrasts.records("train")] + [p.record.question for p in refusal_prompts.load()]
    assert not texts & {normalise(text) for text in others}
    # the two prompts of a pair share an id and a half
    matched = {p.record.id: p for p in prompts if p.set == "matched"}
    for p in prompts:
        if p.set == "counterpart":
            assert matched[p.record.id].half == p.half
            assert matched[p.record.id].record.question != p.record.question
    assert {p.half for p in prompts if p.set == "edgy"} == {"validation", "test"}


def halves_of(prompts):
    found = {}
    for p in prompts:
        found.setdefault(normalise(p.record.question), set()).add(p.half)
    return found


def test_no_training_prompt_is_a_matched_harmful_one():
    require_embedded()
    matched = {normalise(harmful.question) for harmful, _ in embedded.matched_pairs()}
    assert len(matched) == 150
    rows = [row for task in OBJECTIVES for split in ("train", "validation") for row in load_records(task, split)]
    rows += [pair for split in ("train", "validation") for pair in load_pairs("mix", split)]
    assert not matched & {normalise(row.prompt) for row in rows}
    # and none could come in: they count as test prompts
    assert {embedded.prompt_hash(text) for text in matched} <= embedded.test_hashes()
    other = {normalise(row.prompt) for task in ("safety", "overrefusal") for row in load_records(task, "test")}
    assert not matched & other


def test_files_of_yours_stand_in_place_of_their_sets(tmp_path, no_embedded):
    harmful = lines(tmp_path / "bad.jsonl", [{"Goal": "Do harm", "category": "x"}, {"goal": "do HARM!"}, {"goal": "Hurt"}])
    prompts = refusal_prompts.load(harmful)
    assert [(p.record.question, p.record.id, p.record.category) for p in prompts if p.set == "harmful"] == [
        ("Do harm", "bad-0", "x"), ("Hurt", "bad-2", "")]
    assert Counter(p.set for p in prompts) == {"harmful": 2, "plain": 3, "edgy": 3}
    (tmp_path / "good.csv").write_text('prompt\n"Bake, please"\nSing\n', encoding="utf-8")
    pairs = lines(tmp_path / "p.jsonl", [{"harmful": "Steal a car", "harmless": "Wash a car"},
                                         {"unsafe": "Break a car", "safe": "Wash a car"}])
    prompts = refusal_prompts.load(harmful, str(tmp_path / "good.csv"), pairs)
    assert Counter(p.set for p in prompts) == {"harmful": 2, "harmless": 2, "matched": 2, "counterpart": 2}
    assert [p.record.id for p in prompts if p.set == "matched"] == [p.record.id for p in prompts if p.set == "counterpart"]
    # two pairs that share a prompt are in one half
    assert len({p.half for p in prompts if p.set in ("matched", "counterpart")}) == 1


def test_a_pair_keeps_its_prompts_together_wherever_they_stand(tmp_path, no_embedded):
    bad, good = ([{"prompt": f"{kind} number {i}"} for i in range(40)] for kind in ("harm", "good"))
    pairs = [{"harmful": f"Harm number {i}", "harmless": f"good number {i}"} for i in range(40)]
    prompts = refusal_prompts.load(*(lines(tmp_path / f"{name}.jsonl", rows)
                                     for name, rows in (("bad", bad), ("good", good), ("pairs", pairs))))
    half = {(p.set, p.record.id.rpartition("-")[2]): p.half for p in prompts}
    for i in map(str, range(40)):
        assert half["harmful", i] == half["harmless", i] == half["matched", i] == half["counterpart", i]
    assert {p.half for p in prompts} == {"validation", "test"}
    # a prompt keeps its half whatever else is in the file
    fewer = refusal_prompts.load(lines(tmp_path / "few.jsonl", bad[7:9]), lines(tmp_path / "g.jsonl", good[5:9]),
                                 lines(tmp_path / "q.jsonl", pairs[7:8]))
    assert {p.record.question: p.half for p in fewer if p.set == "harmless"}.items() <= {
        p.record.question: p.half for p in prompts if p.set == "harmless"}.items()


def problems(*places):
    with pytest.raises(UserError) as raised:
        refusal_prompts.load(*places)
    return "\n".join(raised.value.problems)


def test_every_error_names_flag_and_line(tmp_path, no_embedded):
    assert "--harmful " in (said := problems(str(tmp_path / "none.csv")))
    assert "no such file" in said
    said = problems(lines(tmp_path / "a.jsonl", [{"words": "x"}, {"prompt": " "}, {"prompt": 3}, {"prompt": "fine"}]))
    assert "a.jsonl:1: no column of prompts (columns: words); call it one of: prompt" in said
    assert "a.jsonl:2: column prompt is blank or no text" in said
    assert "a.jsonl:3: column prompt is blank or no text" in said
    assert all(line.startswith("--harmful ") for line in said.splitlines())
    said = problems(None, lines(tmp_path / "b.jsonl", [{"prompt": "x", "Prompt": "y"}]))
    assert said.startswith("--harmless ")
    assert "two columns 'prompt'" in said
    rows = [{"harmful": "x"}, {"harmful": "x", "harmless": ""}, {"harmful": "Same.", "harmless": "same"}]
    said = problems(None, None, lines(tmp_path / "c.jsonl", rows))
    assert "--pairs " in said
    assert "c.jsonl:1: no column harmless (columns: harmful)" in said
    assert "c.jsonl:2: a prompt is blank or no text" in said
    assert "c.jsonl:3: harmful and harmless are the same prompt; give two" in said
    both = lines(tmp_path / "d.jsonl", [{"prompt": "Overrefusal 3?"}])
    assert "--harmful and --harmless: 1 prompts are in both sets (the first: d-0); leave each in one" in problems(both)
    (tmp_path / "e.txt").write_text("x")
    assert "unknown type '.txt'" in problems(None, None, str(tmp_path / "e.txt"))
