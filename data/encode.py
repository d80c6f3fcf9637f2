"""Text to token ids with a label mask: only answer tokens are trained on; truncation is counted, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.prompts import Template
from data.records import Pair, Record
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
    return fronts_of([text], tokenizer, template)[0]


def fronts_of(texts: Sequence[str], tokenizer: Any, template: Template) -> list[list[int]]:
    """``prompt_ids`` of many texts in one call: a fast tokenizer spreads a batch over the cores."""
    rows = tokenizer(list(texts), add_special_tokens=template.special_tokens)["input_ids"]
    if not template.special_tokens:
        return rows
    # some tokenizers close every text with their EOS: the model would have ended before its answer begins
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token) else ids
            for text, ids in zip(texts, rows, strict=True)]


def render(template: Template, record: Record | Pair) -> str:
    """The text of a record up to the cue for its answer; the history is only named where there is one."""
    more = {"history": record.history} if record.history else {}
    return template.render(record.prompt, record.input, record.system, **more)


def encode(records: Sequence[Record], tokenizer: Any, template: Template, max_length: int, turns: str = "last") -> Encoded:
    """Encode prompt + answer + end marker + EOS, tokenised apart so that the label boundary is exact.

    Args:
        turns: ``last`` labels the record's answer alone; ``all`` the answers of its history, too, each with its end.

    Raises:
        UserError: the tokenizer has no EOS, no row is left, or earlier answers cannot be found in the rendered text.
    """
    # before any work: a model that never saw an end would write on to the token limit at every test
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could never learn to stop; use another tokenizer")
    rows, truncated, dropped = [], 0, 0
    if not records:
        raise UserError("no rows to encode: the data source is empty; see --data_path and --max_train_samples")
    prompts = [render(template, record) for record in records]
    fronts = fronts_of(prompts, tokenizer, template)
    end: list[int] = []
    if template.lead:
        answers = _joined(prompts, fronts, records, tokenizer, template)
    else:
        answers = tokenizer([record.answer for record in records], add_special_tokens=False)["input_ids"]
        end = tokenizer(template.end, add_special_tokens=False)["input_ids"] if template.end else []
    # with or without an end marker: the EOS is where generation stops
    end = [*end, tokenizer.eos_token_id]
    for record, text, front, answer in zip(records, prompts, fronts, answers, strict=True):
        # the answer is cut, never the end: the model must also learn to stop on rows that do not fit
        room = max_length - len(front) - len(end)
        # no token of the answer would be left, only its end
        if room < 1:
            dropped += 1
            continue
        truncated += len(answer) > room
        labels = [*answer[:room], *end]
        earlier = [IGNORE] * len(front)
        if turns == "all" and record.history:
            earlier = _earlier_labels(record, text, front, tokenizer, template)
        rows.append({"input_ids": front + labels, "labels": earlier + labels, "objective": record.objective})
    if not rows:
        raise UserError(f"--model_max_length {max_length}: every prompt fills the window; raise it")
    return Encoded(rows, truncated, dropped)


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, template: Template, max_length: int) -> tuple[list[dict[str, Any]],
                                                                                                     Encoded]:
    """Preference pairs as the same ids that training on answers and inference would read: same template, start token, cut
    and end.

    Returns:
        rows {prompt_ids, chosen_ids, rejected_ids}, in order; what ``encode`` says of all chosen and rejected answers.

    Raises:
        UserError: the tokenizer has no EOS, or no pair is left.
    """
    def side(answers: Sequence[str]) -> list[Record]:
        return [Record(p.prompt, answer, p.objective, p.input, p.id, system=p.system, history=p.history)
                for p, answer in zip(pairs, answers, strict=True)]

    # a prompt fills the window or not whatever its answer: both sides lose the same rows
    chosen = encode(side([pair.chosen for pair in pairs]), tokenizer, template, max_length)
    rejected = encode(side([pair.rejected for pair in pairs]), tokenizer, template, max_length)
    rows = []
    for good, bad in zip(chosen.rows, rejected.rows, strict=True):
        first = next(i for i, label in enumerate(good["labels"]) if label != IGNORE)
        rows.append({"prompt_ids": good["input_ids"][:first], "chosen_ids": good["input_ids"][first:],
                     "rejected_ids": bad["input_ids"][first:]})
    both = Encoded([*chosen.rows, *rejected.rows], chosen.truncated + rejected.truncated, chosen.dropped)
    return rows, both


def _earlier_labels(record: Record, text: str, front: Sequence[int], tokenizer: Any, template: Template) -> list[int]:
    """Labels of a rendered prompt in which the answers of earlier turns, and the special token after each, are trained on.

    The ids stay those of the whole prompt, as inference reads them; an answer's tokens are found by their characters.

    Raises:
        UserError: a slow tokenizer, or a template that writes an earlier answer otherwise than it asks for it.
    """
    hint = "; use --train_on_turns last"
    if not tokenizer.is_fast:
        raise UserError(f"--train_on_turns all: needs a fast tokenizer (tokenizer.json){hint}")
    found = tokenizer(text, add_special_tokens=template.special_tokens, return_offsets_mapping=True)
    labels = [IGNORE] * len(front)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for place, (user, answer) in enumerate(record.history):
        asked = template.render(user, "", record.system, record.history[:place])
        start = len(asked)
        while text.startswith(asked) and text[start : start + 1].isspace() and not text.startswith(answer, start):
            start += 1
        # what the template strips from an answer is no part of it
        kept = answer if text.startswith(answer, start) else answer.strip()
        if not text.startswith(asked) or not text.startswith(kept, start):
            raise UserError(f"--train_on_turns all: the template '{template.name}' writes the answer of turn {place + 1} of "
                            f"row '{record.id}' otherwise than it asks for it (some strip earlier answers){hint}")
        # with the template's lead: a model writes it as part of its first token
        first, last = (len(asked) if template.lead else start), start + len(kept)
        between: list[int] | None = None  # tokens of white space since the answer's last one
        for i, (begin, end) in enumerate(found["offset_mapping"][: len(front)]):
            if begin >= first and end <= last and begin < end:
                labels[i], between = front[i], []
            elif between is not None and begin >= last:
                if front[i] in special:
                    # the end of the turn, as after the last answer: the model must learn to stop here, too
                    for j in (*between, i):
                        labels[j] = front[j]
                elif not text[begin:end].strip():
                    between.append(i)
                    continue
                break
    return labels


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
