"""Multiple choice by likelihood: each answer's log-probability, turned into MC1, MC2 or a preference per question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.records import Choice
from evaluator.scoring.engine import prompt_hash
from evaluator.scoring.likelihood import answer_logprobs
from evaluator.statistics import metrics

if TYPE_CHECKING:
    from models.runs import Loaded


@dataclass(frozen=True)
class Outcome:
    """Summed log-probability and number of tokens of each answer to one question."""

    choice: Choice
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]

    def row(self, name: str, values: dict[str, float]) -> dict[str, Any]:
        """The line of the rows file."""
        asked = prompt_hash(self.choice.prompt, *self.choice.choices)
        return {"set": name, "id": self.choice.id, "category": self.choice.category, "prompt_hash": asked, "values": values,
                "logprobs": [round(value, 4) for value in self.logprobs]}


def outcomes(loaded: Loaded, choices: Sequence[Choice], batch_tokens: int) -> list[Outcome]:
    """Score every answer of every question in shared passes."""
    prompts = [loaded.template.render(choice.prompt, "") for choice in choices]
    items = [(prompt, answer) for prompt, choice in zip(prompts, choices, strict=True) for answer in choice.choices]
    # all questions at once: the passes are filled across their borders
    scored = iter(answer_logprobs(loaded, items, batch_tokens))
    per_question = []
    for choice in choices:
        pairs = [next(scored) for _ in choice.choices]
        per_question.append(Outcome(choice, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)))
    return per_question


def preference_score(
    loaded: Loaded, choices: Sequence[Choice], name: str, definition: str, batch_tokens: int
) -> tuple[metrics.Score, list[dict[str, Any]]]:
    """Rate of questions whose preferred answer has the highest mean log-probability per token; score and rows."""
    per_question = outcomes(loaded, choices, batch_tokens)
    hits = [metrics.preference(o.logprobs, o.tokens, o.choice.best) for o in per_question]
    rows = [o.row(name, {name: hit}) for o, hit in zip(per_question, hits, strict=True)]
    return metrics.rate(hits, name, definition, higher_is_better=True), rows
