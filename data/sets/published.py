"""The papers' data in their published shapes, from local files or the hub: Alpaca, AlpacaEval, BeaverTails, TruthfulQA.

A file is read by its shape, whatever its name. All problems of a file are raised together, each with ``file:line``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.readers.row_files import SUFFIXES, Problems, Row, read_rows
from data.records import Pair, Record, stable_hash
from errors import UserError

log = logging.getLogger(__name__)
ALPACA_FILE = Path(__file__).parents[1] / "alpaca_small.json"


@dataclass(frozen=True)
class Shape:
    """A kind of row: the fields that give it away, and each field's kind (see ``_CHECKS``)."""

    name: str
    mark: frozenset[str]
    fields: dict[str, str]

    def describe(self) -> str:
        """The shape in a user's words."""
        return f"{self.name} {{{', '.join(self.fields)}}}"


_PAIR = Shape("preference", frozenset({"prompt", "chosen", "rejected"}),
              {"prompt": "text", "chosen": "text", "rejected": "text", "input": "optional"})
_BEAVER = Shape("BeaverTails", frozenset({"prompt", "response"}),
                {"prompt": "text", "response": "answer", "is_safe": "flag", "category": "any"})
_TRUTH = Shape("TruthfulQA", frozenset({"question", "best_answer"}),
               {"question": "text", "best_answer": "text", "correct_answers": "texts", "category": "any"})
_ALPACA = Shape("Alpaca", frozenset({"instruction"}),
                {"instruction": "text", "input": "optional", "output": "answer"})
_PROMPTS = Shape("prompts for the test split", frozenset({"prompt"}), {"prompt": "text", "category": "any"})
_PKU = Shape("PKU-SafeRLHF", frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
             {"prompt": "text", "response_0": "answer", "response_1": "answer", "is_response_0_safe": "flag",
              "is_response_1_safe": "flag", "safer_response_id": "side"})
_RANKED = Shape("ranked", frozenset({"prompt", "response"}), {"prompt": "text", "response": "two"})
_QUESTIONS = Shape("question and answer", frozenset({"question", "answer"}), {"question": "text", "answer": "answer"})
#: In the order of detection: the more marks, the earlier.
SHAPES = (_PAIR, _PKU, _BEAVER, _TRUTH, _QUESTIONS, _ALPACA, _PROMPTS)
#: Shapes of preference pairs; the third is what SOMF writes of PKU-SafeRLHF: {prompt, response: [chosen, rejected]}.
PAIR_SHAPES = (_PAIR, _PKU, _RANKED)


@dataclass(frozen=True)
class HubSet:
    """Where ``datasets.load_dataset`` finds a published set: its positional arguments, data files, split names."""

    arguments: tuple[str, ...]
    train: str
    test: str
    data_files: str | None = None


HUB: dict[str, HubSet] = {
    # the hub's loading script for AlpacaEval is refused by recent releases of datasets: read its file
    "tatsu-lab/alpaca_eval": HubSet(("json",), "", "train", "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"),
    "PKU-Alignment/BeaverTails": HubSet(("PKU-Alignment/BeaverTails",), "30k_train", "30k_test"),
    "truthfulqa/truthful_qa": HubSet(("truthfulqa/truthful_qa", "generation"), "validation", "validation"),
    "bench-llm/or-bench": HubSet(("bench-llm/or-bench", "or-bench-hard-1k"), "", "train"),
    "openai/gsm8k": HubSet(("openai/gsm8k", "main"), "train", "test"),
    **{name: HubSet((name,), "train", "") for name in (
        "llamafactory/alpaca_gpt4_en", "llamafactory/alpaca_gpt4_zh", "iamshnoo/alpaca-cleaned-hindi",
        "sahil2801/CodeAlpaca-20k")},
}
#: (task, split) -> hub name or local file of H3Fusion's data (its spec, section 2.1) and of SOMF's tasks (its section 2.1).
PUBLISHED: dict[tuple[str, str], str] = {
    ("helpfulness", "train"): str(ALPACA_FILE), ("helpfulness", "test"): "tatsu-lab/alpaca_eval",
    **{("safety", split): "PKU-Alignment/BeaverTails" for split in ("train", "test")},
    **{("truthfulness", split): "truthfulqa/truthful_qa" for split in ("train", "test")},
    ("english", "train"): "llamafactory/alpaca_gpt4_en", ("chinese", "train"): "llamafactory/alpaca_gpt4_zh",
    ("hindi", "train"): "iamshnoo/alpaca-cleaned-hindi", ("code", "train"): "sahil2801/CodeAlpaca-20k",
    **{("maths", split): "openai/gsm8k" for split in ("train", "test")},
}


def records_of(
    place: str, task: str, objective: int, split: str, split_mode: str, unique_prompts: bool
) -> list[Record]:
    """Records of a local file or hub set.

    Args:
        place: a .json, .jsonl or .csv file, or a hub name.
        split: train or test. A TruthfulQA file holds both; any other file *is* a split and is read whole.
        split_mode: for TruthfulQA: ``published`` (first and second half) or ``leak_free`` (by hash of the question).
        unique_prompts: keep only the first row of each prompt (BeaverTails repeats them).

    Raises:
        UserError: with every problem of the file.
    """
    problems = Problems()
    rows = _rows(place, split, problems)
    shape = _shape_of(rows[0], SHAPES[1:])
    # found by shape, so said in shapes: which of them can be trained on
    if shape is _PROMPTS and split == "train":
        raise UserError(f"{rows[0].where}: rows without an answer can only be tested on; allowed for training: "
                        + "; ".join(s.describe() for s in (_ALPACA, _BEAVER, _TRUTH)))
    good = _checked(rows, shape, split, problems)
    problems.raise_if_any()
    if shape is _TRUTH:
        good = _half(good, split, split_mode)
    if shape is _BEAVER and split == "train":
        # as published (H3Fusion's spec, section 2.1): the others are harmful answers
        good = [row for row in good if row.fields["is_safe"]]
    if shape is _PKU:
        good = _one_safe(good, place)
    name = Path(place).stem if is_local(place) else place.split("/")[-1]
    placed = [pair for row in good for pair in _READERS[shape.name](row, objective, split, name)]
    kept = _without_duplicates(placed, lambda r: (r.prompt, r.input, r.answer), place)
    if split == "train" and (blank := sum(not r.answer.strip() for r in kept)):
        log.warning("%s: %d rows without an answer dropped", place, blank)
        kept = [r for r in kept if r.answer.strip()]
    if unique_prompts:
        # reversed twice: a dict keeps the last of equal keys, and the first is wanted
        kept = list({(r.prompt, r.input): r for r in reversed(kept)}.values())[::-1]
    if not kept:
        raise UserError(f"{place}: no row is left for {task} {split}"
                        + (" (no row has is_safe true)" if shape is _BEAVER and split == "train" else ""))
    return kept


def pairs_of(place: str, objective: int, split: str) -> list[Pair]:
    """Preference pairs of a local file or hub set: {prompt, chosen, rejected}, {prompt, response: [chosen, rejected]}, or
    PKU-SafeRLHF's columns, of which a row is a pair when exactly one of its two answers is labelled safe.

    Raises:
        UserError: with every problem of the file; a pair whose two answers are equal is one.
    """
    problems = Problems()
    rows = _rows(place, split, problems)
    shape = _shape_of(rows[0], PAIR_SHAPES)
    # PKU's labels choose the pair in every split, so they are checked in every split
    good = _checked(rows, shape, "train" if shape is _PKU else split, problems)
    if shape is _PKU:
        problems.raise_if_any()
        good = _one_safe(good, place)
    good = [Row(_chosen(row.fields, shape), row.where) for row in good]
    for row in good:
        if row.fields["chosen"].strip() == row.fields["rejected"].strip():
            problems.add(f"{row.where}: chosen and rejected are the same text")
    problems.raise_if_any()
    name = Path(place).stem if is_local(place) else place.split("/")[-1]
    placed = [(Pair(f["prompt"], f["chosen"], f["rejected"], objective, f.get("input") or "", _id(row, name)), row.where)
              for row in good for f in (row.fields,)]
    return _without_duplicates(placed, lambda p: (p.prompt, p.input, p.chosen, p.rejected), place)


def _rows(place: str, split: str, problems: Problems) -> list[Row]:
    if not is_local(place):
        return hub_rows(place, split)
    file = Path(place).expanduser()
    if file.absolute() == ALPACA_FILE and not file.exists():
        raise UserError(f"{file}: not shipped. It is H3Fusion's helpful training set, a JSON list of "
                        "{instruction, input, output}; the file of this name in vinid/safety-tuned-llamas (20k rows of "
                        "cleaned Alpaca) has this shape. Put one there, give a file with --data_path, or use the "
                        "embedded data (--data_source embedded)")
    return read_rows(file, problems)


def is_local(place: str) -> bool:
    """Whether this is meant as a file or folder and not as a hub name."""
    return (Path(place).expanduser().exists() or place.lower().endswith(SUFFIXES)
            or place.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:\w+)?", place))


def hub_rows(name: str, split: str) -> list[Row]:
    """Every row of a hub set's split; a UserError in one sentence when the hub cannot be reached."""
    # NAME:SPLIT takes another split than the one that fits: SOMF trains its mask on PKU-SafeRLHF's test split
    name, _, wanted = name.partition(":")
    hub = HUB.get(name, HubSet((name,), "train", "test"))
    if not (hub_split := wanted or (hub.train if split == "train" else hub.test)):
        raise UserError(f"{name} has no {split} split; give a local file")
    files = {"data_files": hub.data_files} if hub.data_files else {}
    try:
        from datasets import load_dataset

        data = load_dataset(*hub.arguments, split=hub_split, **files)
    except Exception as error:  # the hub client raises a dozen unrelated types; the user needs one sentence
        raise UserError(
            f"{name}: neither a local file nor to be had from the hub ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}); download it where there is a network and give the file "
            f"({', '.join(SUFFIXES)}) with --data_path, or use the embedded data (--data_source embedded)") from None
    return [Row(dict(fields), f"{name}[{hub_split}]:{i + 1}") for i, fields in enumerate(data)]


def _shape_of(row: Row, shapes: Sequence[Shape]) -> Shape:
    for shape in shapes:
        # the first row decides for all: a file is of one shape, and rows that differ are problems
        if shape.mark <= row.fields.keys():
            return shape
    raise UserError(f"{row.where}: fields {', '.join(map(str, row.fields)) or 'none'} are no known shape; "
                    f"allowed: {'; '.join(s.describe() for s in shapes)}")


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "needs text that is not blank"


def _answer(value: Any) -> str | None:
    return None if isinstance(value, str) else "needs text"


def _optional(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "needs text or nothing"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) or str(value).lower() in ("true", "false") else "needs true or false"


def _texts(value: Any) -> str | None:
    ok = isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))
    return None if ok and value else "needs a list of texts (in a CSV: separated by ';')"


def _side(value: Any) -> str | None:
    return None if str(value) in ("0", "1") else "needs 0 or 1"


def _two(value: Any) -> str | None:
    ok = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, str) for v in value)
    return None if ok else "needs two texts: [chosen, rejected]"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "text": _text, "answer": _answer, "optional": _optional, "flag": _flag, "texts": _texts, "side": _side, "two": _two,
    "any": lambda value: None}


def _checked(rows: Iterable[Row], shape: Shape, split: str, problems: Problems) -> list[Row]:
    """The rows whose fields are all of their kind; each other field is a problem."""
    good = []
    for row in rows:
        before = len(problems.found)
        for name, kind in shape.fields.items():
            if kind in ("optional", "any") and name not in row.fields or kind == "flag" and split != "train":
                continue
            if name not in row.fields:
                problems.add(f"{row.where}: field '{name}' is missing; needed: {shape.describe()}")
            elif (wrong := _CHECKS[kind](row.fields[name])) is not None:
                problems.add(f"{row.where}: field '{name}' is a {type(row.fields[name]).__name__} and {wrong}")
        if len(problems.found) == before:
            good.append(_with_flag(row, shape, split))
    return good


def _with_flag(row: Row, shape: Shape, split: str) -> Row:
    # a CSV writes its booleans as text, and bool("False") is true
    flags = {k: str(row.fields[k]).lower() == "true" for k, kind in shape.fields.items()
             if kind == "flag" and split == "train"}
    return Row({**row.fields, **flags}, row.where)


def _one_safe(rows: list[Row], place: str) -> list[Row]:
    """PKU-SafeRLHF rows of which exactly one answer is labelled safe (SOMF, spec section 2.2).

    Raises:
        UserError: the file has no labels, or no such row is left.
    """
    if not all("is_response_0_safe" in row.fields and "is_response_1_safe" in row.fields for row in rows):
        raise UserError(f"{place}: rows without is_response_0_safe and is_response_1_safe; no pair can be chosen")
    kept = [r for r in rows if r.fields["is_response_0_safe"] != r.fields["is_response_1_safe"]]
    log.info("%s: %d rows, in %d exactly one answer is safe", place, len(rows), len(kept))
    if not kept:
        raise UserError(f"{place}: in none of {len(rows)} rows exactly one of the two answers is labelled safe")
    return kept


def _chosen(fields: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """A pair's fields as {prompt, chosen, rejected, ..}."""
    if shape is _PAIR:
        return fields
    sides = fields["response"] if shape is _RANKED else [fields["response_0"], fields["response_1"]]
    better = int(fields["safer_response_id"]) if shape is _PKU else 0
    return {"prompt": fields["prompt"], "chosen": sides[better], "rejected": sides[1 - better]}


def _half(rows: list[Row], split: str, split_mode: str) -> list[Row]:
    if split_mode == "published":
        # unshuffled, so the halves differ in kind: adversarial questions to train on, mostly others to test
        return rows[: len(rows) // 2] if split == "train" else rows[len(rows) // 2 :]
    side = 0 if split == "train" else 1
    return [row for row in rows if truthfulqa_side(row.fields["question"]) == side]


def truthfulqa_side(question: str) -> int:
    """0 (train) or 1 (test): the leak-free split of TruthfulQA, by hash of the question."""
    return stable_hash(question, "truthfulqa half") % 2


def _id(row: Row, name: str, suffix: str = "") -> str:
    return f"{name}-{row.where.rpartition(':')[2]}{suffix}"


def category_text(value: Any) -> str:
    """A category as text; BeaverTails' flags become the names of those that apply."""
    if isinstance(value, dict):  # BeaverTails on the hub: {category: whether it applies}
        return ", ".join(sorted(key for key, applies in value.items() if applies))
    return value if isinstance(value, str) else ""


_Found = list[tuple[Record, str]]


def _alpaca_record(row: Row, objective: int, split: str, name: str) -> _Found:
    fields = row.fields
    return [(Record(fields["instruction"], fields["output"], objective, fields.get("input") or "", _id(row, name)),
             row.where)]


def _beaver_record(row: Row, objective: int, split: str, name: str) -> _Found:
    fields = row.fields
    return [(Record(fields["prompt"], fields["response"], objective, id=_id(row, name),
                    category=category_text(fields.get("category"))), row.where)]


def _truth_records(row: Row, objective: int, split: str, name: str) -> _Found:
    fields = row.fields
    correct = (fields["correct_answers"].split(";") if isinstance(fields["correct_answers"], str)
               else fields["correct_answers"])
    # each correct answer is a training row, 1,417 of 408 questions as published; a test has the best one alone
    answers = [a.strip() for a in correct if a.strip()] if split == "train" else [fields["best_answer"]]
    return [(Record(fields["question"], answer, objective, id=_id(row, name, f"-{j}" if split == "train" else ""),
                    category=category_text(fields.get("category"))), row.where) for j, answer in enumerate(answers)]


def _prompt_record(row: Row, objective: int, split: str, name: str) -> _Found:
    return [(Record(row.fields["prompt"], "", objective, id=_id(row, name),
                    category=category_text(row.fields.get("category"))), row.where)]


def _pku_record(row: Row, objective: int, split: str, name: str) -> _Found:
    """The safer answer alone, for supervised training."""
    fields = _chosen(row.fields, _PKU)
    return [(Record(fields["prompt"], fields["chosen"], objective, id=_id(row, name)), row.where)]


def _question_record(row: Row, objective: int, split: str, name: str) -> _Found:
    fields = row.fields
    return [(Record(fields["question"], fields["answer"], objective, id=_id(row, name)), row.where)]


_READERS: dict[str, Callable[[Row, int, str, str], _Found]] = {
    _ALPACA.name: _alpaca_record, _BEAVER.name: _beaver_record, _TRUTH.name: _truth_records,
    _PROMPTS.name: _prompt_record, _PKU.name: _pku_record, _QUESTIONS.name: _question_record}


def _without_duplicates(found: list[tuple[Any, str]], key: Callable[[Any], Any], place: str) -> list[Any]:
    """The first of identical rows; the number of the others and the first one's line are a warning."""
    seen: dict[Any, Any] = {}
    repeated = []
    for row, where in found:
        if key(row) in seen:
            repeated.append(where)
        else:
            seen[key(row)] = row
    if repeated:
        log.warning("%s: %d rows repeat an earlier prompt and answer and were dropped, the first at %s",
                    place, len(repeated), repeated[0])
    return list(seen.values())
