"""What a judge is: items in, verdicts out, and a version that names everything its verdicts depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One answer to judge.

    Args:
        prompt: the request as the person wrote it, without template or system prompt.
        answer: what the model said, stop strings removed; "" is an answer.
        other: the answer to compare with (pairwise judges), else "".
        id: the row's id, for the rows file; no part of the cache key.
    """

    prompt: str
    answer: str
    other: str = ""
    id: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one item.

    Args:
        label: the judge's yes or no (harmful, refused, true, informative, better than ``other``); None when there is none.
        score: its number on the judge's own scale (a probability, 1 to 5, a reward, a preference 0 to 1); None likewise.
        labels: per-category numbers, e.g. the 14 probabilities of a QA-moderation head.
        reason: the judge's own words, if it gives any.
        note: what went wrong or was cut: "", "truncated", "unparsed", "failed: ..."; shown as counts beside the score.
    """

    label: bool | None
    score: float | None = None
    labels: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    note: str = ""

    @property
    def final(self) -> bool:
        """Whether it may be cached: a failed call is asked again next time, an unparsed answer is not paid twice."""
        return not self.note.startswith("failed")


class Judge(Protocol):
    """A judge that is ready to work. ``name`` and ``version`` are the cache key's first half.

    ``version`` is a hash (or a text) of everything that verdicts depend on: rules, weights, prompt texts, thresholds.
    """

    name: str
    version: str

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield (position in ``items``, verdict) as verdicts come, in any order, each position once."""
        ...


def divides(judge: Judge) -> bool:
    """Whether it is a model on disk (its ``source``), whose batches the processes of a launch share (``in_turns``).

    All of them then see every verdict. Rules take no time, and an endpoint is asked once.
    """
    return hasattr(judge, "source")
