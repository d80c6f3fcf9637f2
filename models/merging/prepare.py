"""What a method must know about the whole model before it starts on a tensor: the first step of those that need one.

Only TIES with ``scope: model`` does: its k largest entries are sought over all tensors of an input together. The executor
walks every tensor three times for it, each time with one of the functions ``count_*`` below:

    1. count high bits   -> the bin of upper bits that holds the k-th largest magnitude
    2. count low bits    -> the magnitude itself, and how many entries equal to it belong to the k largest
    3. count equals      -> how many such entries each tensor has, so that the quota can be handed out before the merge

The third is what one tensor alone does not need: the merge runs on tensors in any order and on many workers, but which of
the equal entries are kept must not depend on that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from models.merging.plan import Job
from models.operators.blocks import Block
from models.operators.dense import task_vectors
from models.operators.selection import (
    EVERYTHING,
    NOTHING,
    LowHistogram,
    MagnitudeCut,
    count,
    cut_at,
    descend,
    high_histogram,
    magnitude_bits,
)

#: Runs a function on the blocks of every tensor that is merged, on the workers; returns tensor name -> its result.
Walk = Callable[[Callable[[Iterable[Block]], Any]], dict[str, Any]]


class Totals:
    """Counts per input, added up over tensors as the workers bring them: integers, so that their order leaves no trace.

    Kept apart they would be a table per tensor and input: half a megabyte each, beyond the memory that was promised.
    """

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def add(self, which: int, counts: Tensor) -> None:
        with self._lock:
            self.counts[which] = self.counts[which].add_(counts) if which in self.counts else counts


def ties_over_the_model(jobs: tuple[Job, ...], walk: Walk) -> dict[str, list[MagnitudeCut]]:
    """With ``scope: model``, one threshold per input over all its tensors; exactly k kept, ties by tensor name, then index.

    Returns:
        tensor name -> a cut per input; nothing for ``scope: tensor``.
    """
    jobs = tuple(job for job in jobs if not job.copied)
    if not jobs or jobs[0].parameters.scope != "model":
        return {}
    total = sum(prod(job.shape) for job in jobs)
    sizes = [count(density, total) for density in jobs[0].parameters.density]
    thresholds = find_thresholds(sizes, total, walk)
    equals = walk(partial(count_equals, thresholds=thresholds)) if thresholds else {}
    quotas = hand_out({which: cut.ties for which, cut in thresholds.items()}, equals)

    def cut_for(tensor: str, which: int) -> MagnitudeCut:
        if which in thresholds:
            return MagnitudeCut(thresholds[which].threshold, quotas[tensor][which])
        return EVERYTHING if sizes[which] else NOTHING

    return {job.name: [cut_for(job.name, which) for which in range(len(sizes))] for job in jobs}


def find_thresholds(sizes: Sequence[int], total: int, walk: Walk) -> dict[int, MagnitudeCut]:
    """Input -> the cut of its k-th largest magnitude over the model; inputs that keep all or nothing need none.

    Args:
        sizes: per input, how many entries are kept.
        total: entries of an input.
    """
    cutting = [which for which, kept in enumerate(sizes) if 0 < kept < total]
    if not cutting:
        return {}
    high, low = Totals(), Totals()
    walk(partial(count_high_bits, inputs=cutting, totals=high))
    bins = {which: descend(high.counts[which], sizes[which]) for which in cutting}
    walk(partial(count_low_bits, bins={which: bin_ for which, (bin_, _) in bins.items()}, totals=low))
    return {which: cut_at(bin_, low.counts[which], rest) for which, (bin_, rest) in bins.items()}


def count_high_bits(blocks: Iterable[Block], inputs: Sequence[int], totals: Totals) -> None:
    """The first pass over one tensor: counts of the upper bits of its task vectors' magnitudes."""
    own: dict[int, Tensor] = {}
    for block in blocks:
        deltas = task_vectors(block)
        for which in inputs:
            histogram = high_histogram(deltas[which]).cpu()
            own[which] = own[which].add_(histogram) if which in own else histogram
    for which, histogram in own.items():
        totals.add(which, histogram)


def count_low_bits(blocks: Iterable[Block], bins: Mapping[int, int], totals: Totals) -> None:
    """The second pass over one tensor: counts of the lower bits of those magnitudes that lie in the input's bin."""
    own = {which: LowHistogram(bin_) for which, bin_ in bins.items()}
    for block in blocks:
        deltas = task_vectors(block)
        for which, histogram in own.items():
            histogram.add(deltas[which])
    for which, histogram in own.items():
        totals.add(which, histogram.total())


def count_equals(blocks: Iterable[Block], thresholds: Mapping[int, MagnitudeCut]) -> dict[int, int]:
    """The third pass over one tensor: input -> how many of its magnitudes equal the threshold."""
    equals = dict.fromkeys(thresholds, 0)
    for block in blocks:
        deltas = task_vectors(block)
        for which, cut in thresholds.items():
            equals[which] += int((magnitude_bits(deltas[which]) == cut.threshold).sum())
    return equals


def hand_out(quotas: Mapping[int, int], equals: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Tensor -> input -> how many entries equal to the threshold it keeps: all it has, until the quota is used up.

    Args:
        quotas: input -> how many may be kept in the model.
        equals: tensor -> input -> how many there are.
    """
    left = dict(quotas)
    shares: dict[str, dict[int, int]] = {}
    # by name: the one order that neither the files' layout nor the workers change
    for tensor in sorted(equals):
        shares[tensor] = {which: min(left[which], there) for which, there in equals[tensor].items()}
        for which, share in shares[tensor].items():
            left[which] -= share
    return shares


#: method function -> its preparation
PREPARE: dict[str, Callable] = {"ties": ties_over_the_model}
