"""What a sample is: one question with its answer, a preference pair, or a multiple choice.

Plain frozen dataclasses with validation; nothing here knows a tokenizer, a file format or a model.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import TypeVar

from flags import OBJECTIVES, TASKS

__all__ = ["HELPFULNESS", "OBJECTIVES", "SAFETY", "SPLITS", "TASKS", "TRUTHFULNESS", "Choice", "Pair", "Record", "Row",
           "normalise", "stable_hash"]

SPLITS: tuple[str, ...] = ("train", "validation", "test")
#: Ids of the objectives: places in ``OBJECTIVES``.
HELPFULNESS, SAFETY, TRUTHFULNESS = range(len(OBJECTIVES))


@dataclass(frozen=True)
class Record:
    """One prompt with its reference answer.

    Args:
        prompt: the instruction or question, untemplated.
        answer: the reference answer; empty for prompts that are only generated from.
        objective: index into ``OBJECTIVES``; travels with the sample to the gating loss.
        input: Alpaca's optional second field.
        id: stable name of the row (source and position), used for resume and per-row reports.
        category: free-form group name for per-category rates; empty when the source has none.
        system: the system text of a dialog; empty: none.
        history: earlier exchanges of the dialog, first one first: (the user's words, the answer).
    """

    prompt: str
    answer: str
    objective: int
    input: str = ""
    id: str = ""
    category: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def question(self) -> str:
        """The user's words: the prompt, and the input below it."""
        return f"{self.prompt}\n\n{self.input}" if self.input else self.prompt


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a dispreferred answer (DPO, preference accuracy); system, history as in ``Record``."""

    prompt: str
    chosen: str
    rejected: str
    objective: int
    input: str = ""
    id: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


#: Rows that training draws: all of one kind or all of the other.
Row = TypeVar("Row", Record, Pair)


@dataclass(frozen=True)
class Choice:
    """One question with several answers, some of them right (MC1, MC2, HHH).

    Args:
        prompt: the question, untemplated; a dialog of several turns as one text, "Human:" and "Assistant:" in it.
        choices: candidate answers.
        labels: 1 for a right answer, 0 for a wrong one; same length as ``choices``.
        best: index of the answer that MC1 counts as the single right one.
        history: earlier exchanges of a dialog, as in ``Record``; empty where there is one turn.
        last: the user's last words where there is a history.
    """

    prompt: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]
    best: int
    id: str = ""
    category: str = ""
    history: tuple[tuple[str, str], ...] = ()
    last: str = ""

    def __post_init__(self) -> None:
        if len(self.choices) != len(self.labels):
            raise ValueError(f"{self.id}: {len(self.choices)} choices but {len(self.labels)} labels")
        # MC1 compares the best answer with wrong ones: a best that is wrong would make every score 0
        if not (0 <= self.best < len(self.choices)) or not self.labels[self.best]:
            raise ValueError(f"{self.id}: best={self.best} is not the index of a right answer")


_SPACE = re.compile(r"\s+")
_NOT_WORD = re.compile(r"[^\w\s]", re.UNICODE)


def normalise(text: str) -> str:
    """Case, punctuation, quotes and white space folded: two prompts that differ only there are the same prompt."""
    # NFKC and casefold: full-width letters, and a German sharp s for ss, make no other prompt
    text = unicodedata.normalize("NFKC", text).casefold()
    return _SPACE.sub(" ", _NOT_WORD.sub(" ", text)).strip()


def stable_hash(text: str, salt: str = "") -> int:
    """A 64-bit hash of the normalised text that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{normalise(text)}".encode(), digest_size=8).digest(), "big")
