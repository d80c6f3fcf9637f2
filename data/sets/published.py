"""The papers' data in their published shapes, from local files or the hub: Alpaca, AlpacaEval, BeaverTails, TruthfulQA.

A file is read by its shape, whatever its name. All problems of a file are raised together, each with ``file:line``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.readers import pair_rows
from data.readers.columns import HISTORY, SYSTEM, refused, tell_unread
from data.readers.dialog_files import KNOWN as DIALOG_SHAPES
from data.readers.dialog_files import SHAPES as TABLE_SHAPES
from data.readers.dialog_files import records_of_rows, system_of
from data.readers.fields import Shape, checked
from data.readers.row_files import Problems, Row, read_rows
from data.readers.turns import TURNS, empty, history_of
from data.records import Pair, Record, stable_hash
from data.sets.hub import hub_rows, is_local
from errors import UserError

log = logging.getLogger(__name__)
ALPACA_FILE = Path(__file__).parents[1] / "alpaca_small.json"

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
SHAPES = (_PKU, _BEAVER, _TRUTH, _QUESTIONS, _ALPACA, _PROMPTS)
#: Shapes of pairs beside ``pair_rows``' own; SOMF writes PKU-SafeRLHF as {prompt, response: [chosen, rejected]}.
PAIR_SHAPES = (_PKU, _RANKED)
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
        place: a file of rows (``data/readers/row_files.py``), or a hub name.
        split: train or test. A TruthfulQA file holds both; any other file *is* a split and is read whole.
        split_mode: for TruthfulQA: ``published`` (first and second half) or ``leak_free`` (by hash of the question).
        unique_prompts: keep only the first row of each prompt (BeaverTails repeats them).

    Raises:
        UserError: with every problem of the file.
    """
    problems = Problems()
    rows = _rows(place, split, problems)
    name = Path(place).stem if is_local(place) else place.split("/")[-1]
    if _is_dialog(rows[0].fields, split, task):
        found = records_of_rows(rows, split, objective, name, problems)
        problems.raise_if_any()
        return _kept([(record, row.where) for record, row in zip(found, rows, strict=True)], task, split, place,
                     unique_prompts)
    shape = _shape_of(rows[0], SHAPES)
    # found by shape, so said in shapes: which of them can be trained on
    if shape is _PROMPTS and split == "train":
        raise UserError(f"{rows[0].where}: rows without an answer can only be tested on; allowed for training: "
                        + "; ".join([*(s.describe() for s in (_ALPACA, _BEAVER, _TRUTH)), DIALOG_SHAPES]),
                        *(f"{rows[0].where}: {sentence}" for sentence in refused(rows[0].fields, (*SYSTEM, *HISTORY))))
    good = checked(rows, shape, split, problems)
    problems.raise_if_any()
    if shape is _TRUTH:
        good = _half(good, split, split_mode)
    if shape is _BEAVER and split == "train":
        # as published (H3Fusion's spec, section 2.1): the others are harmful answers
        good = [row for row in good if row.fields["is_safe"]]
    if shape is _PKU:
        good = _one_safe(good, place)
    read = {*shape.fields, *SYSTEM, *HISTORY}
    tell_unread(place, (column for row in rows for column in row.fields), read)
    placed = [(_in_context(record, row.fields), where) for row in good
              for record, where in _READERS[shape.name](row, objective, split, name)]
    return _kept(placed, task, split, place, unique_prompts, " (no row has is_safe true)" if shape is _BEAVER else "")


def _is_dialog(fields: dict[str, Any], split: str, task: str) -> bool:
    """Whether a row is for the reader of dialogs: it has turns, or a question and an answer that no shape here has."""
    shape = next((shape for shape in SHAPES if shape.mark <= fields.keys()), None)
    # Dolly's answers are called response; answers without a label are BeaverTails' for no task but safety
    other = (shape is _ALPACA and "output" not in fields) or (
        shape is _BEAVER and "is_safe" not in fields and split == "train" and task != "safety")
    if shape in (None, _PROMPTS) or other:
        # a column of prompts can be tested on, whatever stands beside it
        return any(name in fields for name in TURNS) and (shape is None or split == "train") or (
            any(table.fits(fields) for table in TABLE_SHAPES))
    return shape is not _PKU and any(not empty(fields.get(name)) for name in TURNS)


def _in_context(record: Any, fields: dict[str, Any]) -> Any:
    """The record or pair with the system text and the earlier exchanges of its row, both checked before."""
    history = next((fields[name] for name in HISTORY if not empty(fields.get(name))), None)
    return replace(record, system=system_of(fields), history=history_of(history))


def _kept(placed: list[tuple[Record, str]], task: str, split: str, place: str, unique_prompts: bool,
          reason: str = "") -> list[Record]:
    """Rows without repeats and, for training, without blank answers."""
    kept = _without_duplicates(placed, lambda r: (r.system, r.history, r.prompt, r.input, r.answer), place)
    if split == "train" and (blank := sum(not r.answer.strip() for r in kept)):
        log.warning("%s: %d rows without an answer dropped", place, blank)
        kept = [r for r in kept if r.answer.strip()]
    if unique_prompts:
        # reversed twice: a dict keeps the last of equal keys, and the first is wanted
        kept = list({(r.prompt, r.input): r for r in reversed(kept)}.values())[::-1]
    if not kept:
        raise UserError(f"{place}: no row is left for {task} {split}"
                        + (reason if split == "train" else ""))
    return kept


def pairs_of(place: str, objective: int, split: str) -> list[Pair]:
    """Preference pairs of a local file or hub set: the shapes of ``data/readers/pair_rows.py``, {prompt, response: [chosen,
    rejected]}, or PKU-SafeRLHF's columns, of which a row is a pair when exactly one of its two answers is labelled safe.

    Raises:
        UserError: with every problem of the file; a pair whose two answers are equal is one.
    """
    problems = Problems()
    rows = _rows(place, split, problems)
    if pair_rows.fits(rows[0].fields):
        return _pairs_of_dialogs(rows, objective, place, problems)
    shape = _shape_of(rows[0], PAIR_SHAPES)
    # PKU's labels choose the pair in every split, so they are checked in every split
    good = checked(rows, shape, "train" if shape is _PKU else split, problems)
    if shape is _PKU:
        problems.raise_if_any()
        good = _one_safe(good, place)
    good = [Row(_chosen(row.fields, shape), row.where) for row in good]
    for row in good:
        if row.fields["chosen"].strip() == row.fields["rejected"].strip():
            problems.add(f"{row.where}: chosen and rejected are the same text")
    problems.raise_if_any()
    name = Path(place).stem if is_local(place) else place.split("/")[-1]
    placed = [(_in_context(Pair(f["prompt"], f["chosen"], f["rejected"], objective, "", _id(row, name)), f), row.where)
              for row in good for f in (row.fields,)]
    return _without_duplicates(placed, _of_pair, place)


def _of_pair(pair: Pair) -> tuple:
    return pair.system, pair.history, pair.prompt, pair.input, pair.chosen, pair.rejected


def _pairs_of_dialogs(rows: list[Row], objective: int, place: str, problems: Problems) -> list[Pair]:
    name = Path(place).stem if is_local(place) else place.split("/")[-1]
    placed, unfit = [], []
    for row in rows:
        try:
            pair = pair_rows.read_pair(row.fields, objective, _id(row, name))
        except pair_rows.NoPair:
            unfit.append(row.where)
            continue
        except ValueError as error:
            problems.add(f"{row.where}: {error}")
            continue
        if pair.chosen.strip() == pair.rejected.strip():
            problems.add(f"{row.where}: chosen and rejected are the same text")
        placed.append((pair, row.where))
    problems.raise_if_any()
    if unfit:
        log.warning("%s: %d dialogs are no pair (they differ before the last answer, or one is blank) and were dropped, the "
                    "first at %s", place, len(unfit), unfit[0])
    if not placed:
        raise UserError(f"{place}: no row is a pair of answers to one question")
    tell_unread(place, (column for row in rows for column in row.fields),
                {*pair_rows.ASK, *TURNS, *(n for side in pair_rows.SIDES for n in side), "input", "rejected_messages"})
    return _without_duplicates(placed, _of_pair, place)


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


def _shape_of(row: Row, shapes: Sequence[Shape]) -> Shape:
    for shape in shapes:
        # the first row decides for all: a file is of one shape, and rows that differ are problems
        if shape.mark <= row.fields.keys():
            return shape
    known = "; ".join(s.describe() for s in shapes)
    if shapes is PAIR_SHAPES:
        raise UserError(f"{_unknown(row)}; allowed: {pair_rows.KNOWN}; {known}")
    # columns of another kind of training say best what the file is
    hints = [f"{row.where}: {sentence}" for sentence in refused(row.fields, (*SYSTEM, *HISTORY))]
    raise UserError(f"{_unknown(row)}; allowed: {known}; {DIALOG_SHAPES}", *hints)


def _unknown(row: Row) -> str:
    return f"{row.where}: fields {', '.join(map(str, row.fields)) or 'none'} are no known shape"


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
    sides = fields["response"] if shape is _RANKED else [fields["response_0"], fields["response_1"]]
    better = int(fields["safer_response_id"]) if shape is _PKU else 0
    context = {name: fields[name] for name in (*SYSTEM, *HISTORY) if name in fields}
    return {"prompt": fields["prompt"], "chosen": sides[better], "rejected": sides[1 - better], **context}


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
