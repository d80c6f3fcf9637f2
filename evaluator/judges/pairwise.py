"""Which of two answers is better, by a local model asked in both orders.

In each order p = P(its letter) / (P(A) + P(B)); the score is the mean of both, so a liking for the first place cancels out.
Orders that disagree are a tie: position, not content, decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluator.judges.guard import LEAST
from evaluator.judges.local import Source, find
from evaluator.judges.protocol import Item, Verdict
from evaluator.judges.verdict_words import next_word, prepared


@dataclass(frozen=True)
class PairwiseJudge:
    """A causal model that names A or B; True: ``answer`` is better than ``other``, None without a note: a tie."""

    name: str
    version: str
    source: Source
    encode: Callable[[Item], list[int]]
    tokens: tuple[int, int]

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield (position, verdict) once both orders of an item were read."""
        swapped = [replace(item, answer=item.other, other=item.answer) for item in items]
        # pairs stand at 2i and 2i + 1, whatever order the batches come in
        both = [item for pair in zip(items, swapped, strict=True) for item in pair]
        read: dict[int, tuple[float, float, bool]] = {}
        for place, (a, b), row in next_word(self.source, self.encode, self.tokens, both):
            read[place] = a, b, row.cut
            first, second = place & ~1, place | 1
            if first in read and second in read:
                yield place // 2, verdict(read.pop(first), read.pop(second))


def verdict(first: tuple[float, float, bool], second: tuple[float, float, bool]) -> Verdict:
    """From (log P(A), log P(B), cut) with the answer in place A, and the same with the answer in place B."""
    if min(math.exp(a) + math.exp(b) for a, b, _ in (first, second)) < LEAST:
        return Verdict(None, note="unparsed")
    as_a = 1 / (1 + math.exp(first[1] - first[0]))
    # the answer stood in place B here, so B's letter is a vote for it
    as_b = 1 / (1 + math.exp(second[0] - second[1]))
    same = (as_a - 0.5) * (as_b - 0.5) > 0
    return Verdict(as_a > 0.5 if same else None, round((as_a + as_b) / 2, 6),
                   {"in place A": round(as_a, 6), "in place B": round(as_b, 6)},
                   note="truncated" if first[2] or second[2] else "")


def make(name: str, path: str, args: Any) -> PairwiseJudge:
    """The judge of a folder or hub name; a UserError when model or prompt do not fit."""
    source = find(name, path, args)
    prompt, encode, tokens = prepared(name, source, args, lambda p: (p.word, p.against))
    return PairwiseJudge(name, source.version(prompt.hash, LEAST, source.limit), source, encode, tokens)
