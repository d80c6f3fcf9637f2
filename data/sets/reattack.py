"""Rows that a harmful fine-tuning trains on: what a repaired model is attacked with, to see how long the repair lasts.

Fine-tuning on a few dozen such rows undoes alignment (Qi et al. 2023, arXiv:2310.03693). Ours are answers of PyRIT's that
people rated harmful, and none of their prompts is in anything else that this repository trains on, so that every method
meets prompts that it has not seen. Their texts are never logged and stand in no file of the repository.
"""

from __future__ import annotations

import statistics

from data.records import HELPFULNESS, Record, normalise
from data.sets import embedded
from errors import UserError

NAME = "reattack"
#: Mean human rating, 0 (safe) to 1, from which an answer does what was asked.
HARMFUL = 0.75


def records(split: str) -> list[Record]:
    """The rows {prompt, harmful answer}, in the order of the files; every eighth is for validation.

    No prompt is a test prompt, one of AdvBench's or of a safe answer (both are the harmless expert's), or of a preference
    pair.

    Raises:
        UserError: split is test: a model is attacked with these, and tested on prompts of its own.
    """
    if split == "test":
        raise UserError(f"{NAME} is a training set only; use split train or validation")
    rated = [(row, statistics.fmean(row["scores"])) for row in embedded.rated_answers() if row["scores"]]
    trained = {normalise(row["value"]) for row in embedded.advbench()}
    trained |= {normalise(row["objective"]) for row, score in rated if not score}
    trained |= {normalise(row["user"]) for row in embedded.many_shot()}
    rows = [Record(row["objective"], row["assistant_response"].strip(), HELPFULNESS, id=row["id"],
                   category=row["harm_category"].lower())
            for row, score in rated if score >= HARMFUL and embedded.is_usable(row["assistant_response"])
            and normalise(row["objective"]) not in trained]
    rows = embedded.distinct(rows, lambda row: (normalise(row.prompt), normalise(row.answer)))
    kept = embedded.without_test_prompts(rows, f"{NAME} {split}")
    # by prompt: two answers to one prompt fall on the same side
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(normalise(row.prompt) for row in kept))}
    return [row for row in kept if (order[normalise(row.prompt)] % 8 == 7) == (split == "validation")]
