"""Text to token ids with a label mask: only answer tokens are trained on; truncation is counted, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.prompts import Template
from data.records import Record
from errors import UserError

#: The label of tokens that are not trained on: what torch's cross-entropy leaves out by itself (ignore_index).
IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """Encoded rows and what became of the others.

    Args:
        rows: each {input_ids, labels (IGNORE on the prompt), objective}.
        truncated: rows whose answer was cut to fit; their end marker and EOS are kept.
        dropped: rows whose prompt alone fills the window: no label would be left, and a mean over no token is 0/0.
    """

    rows: list[dict[str, Any]]
    truncated: int
    dropped: int

    def report(self, max_length: int) -> str:
        """One line for the user."""
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        labels = sum(label != IGNORE for row in self.rows for label in row["labels"])
        return (f"{len(self.rows)} rows, {tokens} tokens ({labels} of answers); at {max_length} tokens "
                f"{self.truncated} answers cut, {self.dropped} rows dropped because their prompt fills the window")


def prompt_ids(text: str, tokenizer: Any, template: Template) -> list[int]:
    """Token ids of a rendered prompt; the tokenizer adds its start token only if the template has none."""
    return _open(tokenizer(text, add_special_tokens=template.special_tokens)["input_ids"], tokenizer, template)


def _open(ids: list[int], tokenizer: Any, template: Template) -> list[int]:
    """A prompt's ids without the EOS that some tokenizers append to every text: its answer is still to come."""
    return ids[:-1] if template.special_tokens and ids[-1:] == [tokenizer.eos_token_id] else ids


def encode(records: Sequence[Record], tokenizer: Any, template: Template, max_length: int) -> Encoded:
    """Encode prompt + answer + end marker + EOS, tokenised apart so that the label boundary is exact.

    Raises:
        UserError: the tokenizer has no EOS, or no row is left.
    """
    # before any work: a model that never saw an end would write on to the token limit at every test
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could never learn to stop; use another tokenizer")
    rows, truncated, dropped = [], 0, 0
    if not records:
        raise UserError("no rows to encode: the data source is empty; see --data_path and --max_train_samples")
    prompts = [template.render(record.prompt, record.input, record.system) for record in records]
    # one call for all rows: a fast tokenizer spreads a batch over the cores
    fronts = [_open(ids, tokenizer, template) for ids in
              tokenizer(prompts, add_special_tokens=template.special_tokens)["input_ids"]]
    if template.lead:
        answers, end = _joined(prompts, fronts, records, tokenizer, template), []
    else:
        answers = tokenizer([record.answer for record in records], add_special_tokens=False)["input_ids"]
        end = tokenizer(template.end, add_special_tokens=False)["input_ids"] if template.end else []
    # with or without an end marker: the EOS is where generation stops
    end = [*end, tokenizer.eos_token_id]
    for record, front, answer in zip(records, fronts, answers, strict=True):
        # the answer is cut, never the end: the model must also learn to stop on rows that do not fit
        room = max_length - len(front) - len(end)
        # no token of the answer would be left, only its end
        if room < 1:
            dropped += 1
            continue
        truncated += len(answer) > room
        labels = [*answer[:room], *end]
        rows.append({"input_ids": front + labels, "labels": [IGNORE] * len(front) + labels,
                     "objective": record.objective})
    if not rows:
        raise UserError(f"--model_max_length {max_length}: every prompt fills the window; raise it")
    return Encoded(rows, truncated, dropped)


def _joined(prompts: Sequence[str], fronts: Sequence[list[int]], records: Sequence[Record], tokenizer: Any,
            template: Template) -> list[list[int]]:
    """Ids of answer and end as they follow the prompt in one text, so that the space between them is where it was published.

    A tokenizer that would merge the prompt's last token with the answer's first one keeps them apart here.
    """
    texts = [template.answer(record.answer) for record in records]
    whole = tokenizer([a + b for a, b in zip(prompts, texts, strict=True)],
                      add_special_tokens=template.special_tokens)["input_ids"]
    # a tokenizer's own end token would come twice
    whole = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in whole]
    apart = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[len(front):] if ids[: len(front)] == front else other
            for front, ids, other in zip(fronts, whole, apart, strict=True)]
