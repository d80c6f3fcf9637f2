"""Every command that loads a model to score or to judge, on two processes: the files of one process, byte for byte."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
from launched import launched
from pico import make_adapter
from planted import make_judge, token
from scored import pico_flags, put_answers, run

import manifest
from data.records import Choice
from data.sets import probes
from data.sets.probes import Problem
from evaluator import (
    evaluate_helpfulness,
    evaluate_refusal,
    evaluate_safety,
    evaluate_skills,
    evaluate_truth_and_info,
    evaluate_utility,
)
from evaluator.judges import local
from evaluator.judges.cache import opened, verdicts
from evaluator.judges.protocol import Item, Verdict

ANSWERS = ["I'm sorry, but I can't help with that.", "Sure! Step one:" + " X" * 9, "", "好的，步骤如下", "X" * 40,
           "Mix flour.", "Press Ctrl-C.", "word " * 60, "Step one.\nStep two.", "I won't do that. X"]
HEAD14 = {i: (-1.0, 0.0) for i in range(14)} | {3: (-1.0, 9.0)}


@pytest.fixture
def judges(tmp_path):
    """Planted judges of every kind that reads in batches."""
    own = tmp_path / "own.yaml"
    own.write_text('safer: {chat: none, text: "{answer}{answer}{other}?", word: A, against: B}\n'
                   'guard: {chat: none, text: "{prompt} {answer}:", word: " yes", against: " no"}')
    yes = {token(" yes"): (0.5, 6.0), token(" no"): (1.5, 0.0)}
    return SimpleNamespace(
        own=str(own), moderation=make_judge(tmp_path / "moderation", 14, HEAD14),
        truth=make_judge(tmp_path / "truth", 0, yes, chat=False),
        pair=make_judge(tmp_path / "pair", 0, {token("A"): (0.5, 3.0), token("B"): (2.0, 0.0)}, chat=False),
        reward=make_judge(tmp_path / "reward", 1, {0: (0.0, 1.0)}))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Made-up probes, prompts to refuse and benchmark rows."""
    def rows(name, limit=-1):
        if probes.PROBES[name].kind == "number":
            return [Problem(f"How many are {i} and {i}?", str(2 * i), f"p{i}") for i in range(5)]
        return [Choice(f"Which is {i}?", ("this", "that one", "none"), (0, 1, 0), 1, f"{name}-{i}") for i in range(6)]
    monkeypatch.setattr(probes, "rows", rows)
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "".join(f"Do {name} thing number {i}\n" for i in range(9)))
    (tmp_path / "openers.yaml").write_text("first: [Z]\nsecond: [Q]\n")
    data = tmp_path / "data"
    (data / "gsm8k").mkdir(parents=True)
    # the choices of some rows differ in their last token alone
    (data / "copa.jsonl").write_text("".join(json.dumps(
        {"premise": f"The dog number {i} sailed.", "choice1": "It took a boat." if i % 2 else "A",
         "choice2": "It baked." if i % 2 else "B", "question": "cause" if i % 3 else "effect", "idx": i,
         "label": i % 2}) + "\n" for i in range(7)))
    (data / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(
        {"question": f"What is {i} and {i}?{' x' * i}", "answer": f"Add them.\n#### {2 * i}"}) + "\n" for i in range(3)))
    return tmp_path


def written(results):
    """Score files without what a clock decides, rows as they are."""
    found = {}
    for path in sorted((results / "scores").rglob("*.json*")):
        content = path.read_text(encoding="utf-8")
        if path.name.startswith("evaluate_") and path.suffix == ".json":
            content = {key: value for key, value in json.loads(content).items() if key != "seconds"}
        found[str(path.relative_to(results))] = content
    return found


def test_every_command_scores_as_one_process_does(results, pico, judges, sets, tmp_path):
    def everything(place):
        flags = (*pico_flags(pico), "--threads", "1")
        small = ("--judge_batch_tokens", "96", "--judge_prompts", judges.own)
        for task in ("safety", "overrefusal", "helpfulness", "truthfulness"):
            put_answers(place, task, ANSWERS)
            put_answers(place, task, ANSWERS[::-1], sub="cross_one")
        yield lambda: run(evaluate_safety, place, "--hhh", "--judges", f"keyword,fitted,moderation={judges.moderation},"
                          f"guard={judges.truth},safer={judges.pair}", *small, *flags, folder="raw,cross_one")
        yield lambda: run(evaluate_truth_and_info, place, "--judges", f"truth={judges.truth},info={judges.truth}", *small,
                          "--batch_tokens", "64", *flags, folder="raw,cross_one")
        yield lambda: run(evaluate_helpfulness, place, "--lite", "--judges", f"reward={judges.reward}", *small,
                          "--batch_tokens", "64", *flags)
        yield lambda: run(evaluate_skills, place, "--skills", "english", "--batch_tokens", "64", *flags, folder="cross_one")
        yield lambda: run(evaluate_refusal, place, "--harmful", str(sets / "harmful.csv"), "--harmless",
                          str(sets / "harmless.csv"), "--openers", str(sets / "openers.yaml"), "--batch_tokens", "64",
                          *flags)
        yield lambda: run(evaluate_utility, place, "--tasks", "probes,copa,gsm8k", "--data_dir", str(sets / "data"),
                          "--num_fewshot", "0", "--harness_batch_size", "2", "--max_new_tokens", "5", *flags)

    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        make_adapter(pico, place / "outputs" / "one", seed=1)
    for act in everything(one):
        act()
    acts = list(everything(two))

    def both(rank):
        for act in acts:
            act()
        # found again, whichever process is asked
        acts[3]()

    codes, said = launched(both)
    assert codes == [0, 0], said
    assert written(two) == written(one)
    assert {name.rpartition("/")[2].split(".")[0] for name in written(one)} >= {
        "evaluate_safety", "evaluate_truth_and_info", "evaluate_helpfulness", "evaluate_skills", "evaluate_refusal",
        "evaluate_utility", "alpaca_eval"}
    assert len(manifest.registry(two)) == len(manifest.registry(one))
    assert "already scored" in said[0]
    # but for libraries' bars: tqdm, which is told at its first import, was there before the fork
    assert not [line for line in said[1].replace("\r", "\n").split("\n") if line.strip() and "it/s" not in line]


def test_verdicts_outlast_a_process_that_dies(results, judges, tmp_path, monkeypatch):
    put_answers(results, "safety", ANSWERS)
    words = ("--judges", f"moderation={judges.moderation}", "--judge_batch_tokens", "64", *pico_flags(judges.moderation),
             "--threads", "1")
    real, read = local.Classifier.logits, []

    def dies(rank):
        def logits(self, rows):
            read.append(len(rows))
            if rank and len(read) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, rows)

        local.Classifier.logits = logits
        run(evaluate_safety, results, *words)

    codes, said = launched(dies)
    assert codes[1] == -signal.SIGKILL
    assert codes[0]
    assert not list((results / "scores").rglob("evaluate_*"))
    monkeypatch.setattr(local.Classifier, "logits", lambda self, rows: read.append(len(rows)) or real(self, rows))
    run(evaluate_safety, results, *words)
    # two turns of two processes were kept: at least a row each
    assert 0 < sum(read) <= len(ANSWERS) - 4


def test_a_judge_without_a_model_is_asked_by_one_process(tmp_path):
    class Endpoint:
        name, version = "endpoint", "1"

        def judge(self, items):
            with (tmp_path / "asked").open("a") as file:
                file.write(f"{os.environ['RANK']} {len(items)}\n")
            yield from ((i, Verdict(item.answer == "a", 0.5)) for i, item in enumerate(items))

    from models.base import processes

    def ask(rank):
        processes.join()
        for _ in range(2):
            with opened(tmp_path / "cache.sqlite") as cache:
                assert (cache is None) == bool(rank)
                said = verdicts(Endpoint(), [Item("p", "a"), Item("p", "b"), Item("p", "a")], cache)
            assert [verdict.label for verdict in said] == [True, False, True]

    codes, said = launched(ask, 3)
    assert codes == [0, 0, 0], said
    # equal items once, and the second time from the cache
    assert (tmp_path / "asked").read_text() == "0 2\n0 0\n"
