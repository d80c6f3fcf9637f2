"""Multiple choice by likelihood: each answer's log-probability, turned into MC1, MC2 or a preference per question."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.records import Choice
from errors import UserError
from evaluator.scoring.engine import prompt_hash
from evaluator.scoring.likelihood import answer_logprobs
from evaluator.statistics import metrics

if TYPE_CHECKING:
    from models.runs import Loaded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Summed log-probability and number of tokens of each answer to one question.

    Args:
        flattened: where the question is a dialog that was asked as turns, the log-probabilities when it is one text.
    """

    choice: Choice
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    flattened: tuple[float, ...] = ()

    def row(self, name: str, values: dict[str, float]) -> dict[str, Any]:
        """The line of the rows file."""
        # turns are another prompt than the same dialog as one text: scores of both must not be compared
        said = (*(text for exchange in self.choice.history for text in exchange), self.choice.last) if self.flattened else \
            (self.choice.prompt,)
        more = {"flattened": [round(value, 4) for value in self.flattened]} if self.flattened else {}
        return {"set": name, "id": self.choice.id, "category": self.choice.category,
                "prompt_hash": prompt_hash(*said, *self.choice.choices), "values": values,
                "logprobs": [round(value, 4) for value in self.logprobs], **more}


def outcomes(loaded: Loaded, choices: Sequence[Choice], batch_tokens: int) -> list[Outcome]:
    """Score every answer of every question in shared passes; a dialog of several turns as turns of the template.

    A template without a place for turns (Alpaca's, WizardLM's, a chat template that refuses or drops them) is given the
    dialog as one text, "Human:" and "Assistant:" in it.
    """
    prompts = [loaded.template.render(choice.prompt, "") for choice in choices]
    items = [(prompt, answer) for prompt, choice in zip(prompts, choices, strict=True) for answer in choice.choices]
    # all questions at once: the passes are filled across their borders
    scored = iter(answer_logprobs(loaded, items, batch_tokens))
    per_question = []
    for choice in choices:
        pairs = [next(scored) for _ in choice.choices]
        per_question.append(Outcome(choice, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)))
    # dialogs in passes of their own, after all were scored as one text: what shares a pass moves the last bits of a sum, and
    # questions of one turn keep theirs
    turned = {i: text for i, choice in enumerate(choices) if choice.history and (text := _as_turns(loaded, choice))}
    scored = iter(answer_logprobs(loaded, [(text, answer) for i, text in turned.items() for answer in choices[i].choices],
                                  batch_tokens))
    for i in turned:
        pairs = [next(scored) for _ in choices[i].choices]
        per_question[i] = Outcome(choices[i], tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs),
                                  per_question[i].logprobs)
    return per_question


def _as_turns(loaded: Loaded, choice: Choice) -> str:
    """The dialog through the template; "" where that has no place for turns."""
    if not loaded.template.turns:
        return ""
    try:
        return loaded.template.render(choice.last, "", history=choice.history)
    except UserError as error:
        log.info("%s: asked as one text, for its turns cannot be rendered: %s", choice.id, "; ".join(error.problems))
        return ""


def preference_score(
    loaded: Loaded, choices: Sequence[Choice], name: str, definition: str, batch_tokens: int
) -> tuple[metrics.Score, list[dict[str, Any]]]:
    """Rate of questions whose preferred answer has the highest mean log-probability per token; score and rows."""
    per_question = outcomes(loaded, choices, batch_tokens)
    dialogs, turned = sum(bool(choice.history) for choice in choices), sum(bool(o.flattened) for o in per_question)
    if dialogs:
        kept = f", {dialogs - turned} as one text, for the template takes no turns" if dialogs > turned else ""
        definition += f"; of {dialogs} items of several turns {turned} are asked as turns{kept}"
        log.info("%s: of %d items of several turns %d are asked as turns of the template %s%s", name, dialogs, turned,
                 loaded.template.name, kept)
    hits = [metrics.preference(o.logprobs, o.tokens, o.choice.best) for o in per_question]
    rows = [o.row(name, {name: hit}) for o, hit in zip(per_question, hits, strict=True)]
    return metrics.rate(hits, name, definition, higher_is_better=True), rows
