"""Score the embedded utility probes: the likelihood of answers, or the number in a short greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data.records import Choice
from data.sets.probes import PROBES, Problem
from evaluator.scoring.engine import prompt_hash
from evaluator.scoring.number_match import final_number, same_number
from evaluator.scoring.preferences import outcomes
from evaluator.statistics import metrics

if TYPE_CHECKING:
    from models.runs import Loaded

NOT_A_BENCHMARK = "own prompt, 0 shots, embedded rows: not the benchmark's score"
CHOICE = "probe, {}: share whose right answer has the highest mean log-probability per token ({})"
NUMBER = "probe, {}: share of greedy answers whose last number is the right one ({})"
#: Said after a word problem, so that a chat model ends on the number.
ASK = "Give the final answer as a number."


def score_choices(loaded: Loaded, name: str, rows: Sequence[Choice], batch_tokens: int
                  ) -> tuple[metrics.Score, list[dict[str, Any]]]:
    """The rate of a multiple-choice probe and its rows. All answers of a question share its tokens in one pass."""
    made = outcomes(loaded, rows, batch_tokens)
    hits = [metrics.preference(o.logprobs, o.tokens, o.choice.best) for o in made]
    lines = [o.row(name, {name: hit}) for o, hit in zip(made, hits, strict=True)]
    text = CHOICE.format(PROBES[name].about, NOT_A_BENCHMARK)
    return metrics.rate(hits, name, text, higher_is_better=True), lines


def score_numbers(loaded: Loaded, name: str, rows: Sequence[Problem], max_new_tokens: int, batch_size: int, seed: int
                  ) -> tuple[metrics.Score, list[dict[str, Any]]]:
    """The rate of a word-problem probe and its rows, each with the answer and the number read from it."""
    from models.base import processes
    from models.generation import Decoding, answer_batch

    prompts = [loaded.template.render(f"{row.prompt}\n{ASK}", "") for row in rows]
    # neighbours in length make the least padding; the order of the rows file stays
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # greedy: the seed decides nothing but is asked for
    answers = processes.divided(
        batches, lambda batch: answer_batch(loaded, [prompts[i] for i in batch], Decoding(max_new_tokens), seed))
    texts = {i: answer.text for batch, made in zip(batches, answers, strict=True)
             for i, answer in zip(batch, made, strict=True)}
    hits = [int(same_number(texts[i], row.answer)) for i, row in enumerate(rows)]
    lines = [{"set": name, "id": row.id, "category": "", "prompt_hash": prompt_hash(row.prompt), "output": texts[i],
              "read": _text(texts[i]), "wanted": row.answer, "values": {name: hit}}
             for i, (row, hit) in enumerate(zip(rows, hits, strict=True))]
    text = NUMBER.format(PROBES[name].about, NOT_A_BENCHMARK)
    return metrics.rate(hits, name, text, higher_is_better=True), lines


def _text(answer: str) -> str:
    number = final_number(answer)
    return "" if number is None else str(number)
