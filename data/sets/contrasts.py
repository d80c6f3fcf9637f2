"""Contrast pairs of our own (``contrasts.yaml``): a harmful request, refused, beside a harmless one of its form, answered.

Rows that are all refusals teach to refuse, whoever asks for what: an expert of them refuses harmless prompts too. A pair
lies on one side of the split, by a hash of its texts; the validation side serves to choose settings, never to train.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from data.records import SAFETY, Pair, Record, stable_hash
from data.sets import embedded
from errors import UserError

FILE = Path(__file__).with_name("contrasts.yaml")
#: How ids of contrasts begin.
PREFIX = "contrast-"
#: One pair in so many is for validation.
_HELD_OUT = 4
#: Answers keep their first sentences up to so many characters, the first one up to twice as many: whom to answer is decided
#: in the first words, and the gradient of all later ones drowns theirs (docs/lab-log.md, 2026-11-27).
_SHORT, _LONGEST = 120, 240
_SENTENCE_END = re.compile(r"(?<=[a-z)\"'][.!?])\s+")
#: What answers of a preference pair reject of a harmful request: agreeing, with nothing harmful behind it.
_AGREEMENTS = ("Sure, here is how to do it. First,", "Of course. These are the steps that you need to follow:",
               "Yes, I can help you with that. To begin,", "Certainly! Here is what you should do:")
T = TypeVar("T")


class Contrast(NamedTuple):
    """A pair.

    Args:
        everyday: the harmless half is a plain everyday request; else it looks dangerous or speaks of the same matter.
    """

    id: str
    category: str
    harmful: str
    harmless: str
    answer: str
    everyday: bool


@functools.cache
def read() -> tuple[Contrast, ...]:
    """Every pair, in file order."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(FILE.read_text(encoding="utf-8"), loader)
    return tuple(
        Contrast(f"{PREFIX}{category}-{i}", category, row["harmful"], row["everyday" if "everyday" in row else "harmless"],
                 row["answer"], "everyday" in row)
        for category, rows in content.items() for i, row in enumerate(rows))


def pairs(split: str) -> list[Contrast]:
    """The pairs of a split.

    Raises:
        UserError: there is no test split.
    """
    if split == "test":
        raise UserError("contrasts are a training set only; use split train or validation")
    return [pair for pair in read() if _is_held_out(pair) == (split == "validation")]


def records(split: str) -> list[Record]:
    """Both halves of every pair of a split, one after the other: the harmful one refused, the harmless one answered."""
    return [record for pair in pairs(split) for record in halves(pair)]


def halves(pair: Contrast) -> tuple[Record, Record]:
    """The two safety rows of a pair, with the beginnings of their answers; an id's end says which half it is: harmful,
    harmless or everyday."""
    told = ((pair.harmful, embedded.refusal(pair.harmful), "harmful"),
            (pair.harmless, pair.answer, "everyday" if pair.everyday else "harmless"))
    harmful, harmless = (Record(prompt, beginning(answer) or answer, SAFETY, id=f"{pair.id}-{which}", category=pair.category)
                         for prompt, answer, which in told)
    return harmful, harmless


def preferences(pair: Contrast) -> tuple[Pair, Pair]:
    """A contrast as two preference pairs: refusing the harmful half preferred to agreeing, answering the harmless half
    preferred to refusing it. Lengths are close to each other, so that length decides neither."""
    agreed = _AGREEMENTS[stable_hash(pair.harmful, "agreement") % len(_AGREEMENTS)]
    harmful, harmless = halves(pair)
    return (Pair(harmful.prompt, harmful.answer, agreed, SAFETY, id=harmful.id),
            Pair(harmless.prompt, harmless.answer, embedded.refusal(harmless.prompt), SAFETY, id=harmless.id))


def paired_in(rows: Sequence[Pair], share: float, limit: int, seed: int) -> list[Pair]:
    """Preference pairs, with safety pairs in which a given share are contrasts; at 0 they come back as they are.

    Args:
        limit: safety pairs in all, where there are enough; -1: all of ``rows`` stay and contrasts are added.

    Raises:
        UserError: the share asks for more contrasts than there are.
    """
    own = [row for row in rows if row.objective == SAFETY]
    if not own or not share:
        return list(rows)
    total = round(len(own) / (1 - share))
    total = min(total, limit) if limit >= 0 else total
    known, needed = pairs("train"), round(total * share / 2)
    if needed > len(known):
        raise UserError(f"--pair_contrast_share {share}: of {total} safety pairs these are both halves of {needed} "
                        f"contrasts, and there are {len(known)} to train on; lower it, or --max_train_samples")
    kept = draw(own, min(total - 2 * needed, len(own)), f"pairs {seed}")
    added = [half for pair in draw(known, needed, f"contrasts {seed}") for half in preferences(pair)]
    return [*(row for row in rows if row.objective < SAFETY), *kept, *added,
            *(row for row in rows if row.objective > SAFETY)]


def mixed_in(rows: Sequence[Record], contrast_share: float, answer_share: float, limit: int, seed: int,
             answers: Sequence[Record] = ()) -> list[Record]:
    """The rows, with safety rows in which given shares are contrasts and answers to plain requests.

    Args:
        contrast_share, answer_share: of the safety rows, below 1 together; at 0 and 0 the rows come back as they are.
        limit: safety rows in all, where there are enough; -1: all of ``rows`` stay and the others are added.
        answers: helpful rows to draw from; those with an input are passed over, of long answers the beginning stays.

    Raises:
        UserError: the shares ask for more pairs or answers than there are.
    """
    own = [row for row in rows if row.objective == SAFETY]
    if not own or not (contrast_share or answer_share):
        return list(rows)
    total = round(len(own) / (1 - contrast_share - answer_share))
    total = min(total, limit) if limit >= 0 else total
    # whole pairs: a half alone would teach form again
    known, needed, asked = pairs("train"), round(total * contrast_share / 2), round(total * answer_share)
    plain = [replace(row, answer=text, objective=SAFETY) for row in answers
             if not row.input and embedded.is_usable(text := beginning(row.answer))]
    problems = [f"--{name} {share}: of {total} safety rows these are {count} {what}, and there are {there} to train on; "
                f"lower it, or --max_safety_samples" for name, share, count, what, there in (
                    ("contrast_share", contrast_share, needed, "pairs", len(known)),
                    ("answer_share", answer_share, asked, "plain answers", len(plain))) if count > there]
    if problems:
        raise UserError(*problems)
    kept = draw(own, min(total - 2 * needed - asked, len(own)), f"safety {seed}")
    added = [half for pair in draw(known, needed, f"contrasts {seed}") for half in halves(pair)]
    return [*(row for row in rows if row.objective < SAFETY), *kept, *added, *draw(plain, asked, f"answers {seed}"),
            *(row for row in rows if row.objective > SAFETY)]


def beginning(answer: str) -> str:
    """The first whole sentences of an answer within 120 characters, or the first one up to 240; empty where it is longer."""
    answer = answer.strip()
    ends = [*(found.start() for found in _SENTENCE_END.finditer(answer)), len(answer)]
    return answer[: max((end for end in ends if end <= _SHORT), default=ends[0] if ends[0] <= _LONGEST else 0)]


def draw(items: Sequence[T], count: int, seed: str) -> list[T]:
    """So many of the items, in their order."""
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def _is_held_out(pair: Contrast) -> bool:
    return stable_hash(f"{pair.harmful} {pair.harmless}", "contrasts") % _HELD_OUT == 0
