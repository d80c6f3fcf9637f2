"""Scores of generated answers to held-out task rows: the number for word problems, ROUGE for summaries. Needs no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError
from evaluator.scoring.number_match import numbers, same_number
from evaluator.statistics import metrics


@dataclass(frozen=True)
class Measure:
    """One score of a task's answers.

    Args:
        key: of the value in the rows.
        title: of the column in a table.
        rate: hits with a Wilson interval; else a mean with a bootstrap interval over rows.
    """

    key: str
    title: str
    definition: str
    rate: bool = False


@dataclass(frozen=True)
class Answered:
    """How a task's generated answers are scored.

    Args:
        max_new_tokens: enough for the answers that the task's own rows have; more costs time in every sweep point.
        values: (answer, reference) -> {measure key: value}; None where the reference cannot be compared with.
    """

    measures: tuple[Measure, ...]
    max_new_tokens: int
    values: Callable[[str, str], dict[str, float] | None]


def number_values(answer: str, reference: str) -> dict[str, float] | None:
    """1 where the answer's final number is the reference's; None where the reference is not one number ("Ted", "4; 2")."""
    # GSM8K's reference is its working with the one number after ####
    if len(numbers(reference.rpartition("####")[2])) != 1:
        return None
    return {"match": float(same_number(answer, reference))}


def rouge_values(answer: str, reference: str) -> dict[str, float] | None:
    """ROUGE-1, -2 and -L F1 with stemming (Lin 2004, package rouge_score); None for an empty reference."""
    if not reference.strip():
        return None
    return {name: score.fmeasure for name, score in _scorer().score(reference, answer).items()}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE: the package rouge-score is not installed; pip install -r requirements.txt (it comes with "
                        "lm-eval), or leave summaries_answers out") from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


_ROUGE = "mean F1 of {} between generated and reference summary, words stemmed"
#: Task -> its scores; the keys are ``flags.skills.ANSWERED_SKILLS``, which a test holds together.
TASKS: Mapping[str, Answered] = {
    "maths": Answered((Measure("match", "numeric match ↑", "share of generated answers whose final number is the "
                                                           "reference's, exactly", rate=True),), 64, number_values),
    "summaries": Answered((Measure("rouge1", "ROUGE-1 ↑", _ROUGE.format("single words")),
                           Measure("rouge2", "ROUGE-2 ↑", _ROUGE.format("word pairs")),
                           Measure("rougeL", "ROUGE-L ↑", _ROUGE.format("the longest common subsequence"))), 48,
                          rouge_values),
}


def measures(task: str) -> dict[str, Measure]:
    """Score name -> measure of a task's answers; none where its answers are not scored."""
    return {f"{task}_{measure.key}": measure for measure in TASKS[task].measures} if task in TASKS else {}


def set_name(task: str) -> str:
    """The ``set`` of a task's answers in the rows of scores."""
    return f"{task}_answers"


def rows(task: str, answers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row of values for each answer whose reference can be compared with.

    Raises:
        UserError: no row has such a reference.
    """
    lines = [{"set": set_name(task), "id": row["id"], "category": row["category"], "values": {
        key: round(value, 6) for key, value in values.items()}}
        for row in answers if (values := TASKS[task].values(row["output"], row["reference"])) is not None]
    if not lines:
        raise UserError(f"--skills {set_name(task)}: no answer comes with a reference to compare it with; answer held-out "
                        f"rows: python inference.py --task_name {task}")
    return lines


def scores(task: str, values: Mapping[str, Sequence[float]], seed: int) -> list[metrics.Score]:
    """Every measure of a task that there are values for.

    Args:
        values: measure key -> a value for each row.
    """
    made = []
    for name, measure in measures(task).items():
        row_values = values.get(measure.key, ())
        if measure.rate and row_values:
            made.append(metrics.rate(list(map(int, row_values)), name, measure.definition, higher_is_better=True))
        elif row_values:
            made.append(metrics.mean(row_values, name, measure.definition, higher_is_better=True, seed=seed, bounds=(0, 1)))
    return made
