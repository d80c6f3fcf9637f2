"""What a method must know about the whole model before it starts on a tensor: the first step of those that need one."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from models.merging.plan import Job
from models.operators.dense import task_vectors
from models.operators.selection import (
    EVERYTHING,
    NOTHING,
    Cut,
    LowHistogram,
    count,
    cut_at,
    descend,
    high_histogram,
    magnitude_bits,
)

Walk = Callable[[Callable], dict[str, Any]]


def ties_over_the_model(jobs: tuple[Job, ...], walk: Walk) -> dict[str, list[Cut]]:
    """With ``scope: model``, one threshold per input over all its tensors; exactly k kept, ties by tensor name, then index.

    Returns:
        tensor name -> a Cut per input; nothing for ``scope: tensor``.
    """
    jobs = tuple(job for job in jobs if not job.copied)
    if not jobs or jobs[0].parameters.scope != "model":
        return {}
    inputs = range(len(jobs[0].experts))
    total = sum(prod(job.shape) for job in jobs)
    sizes = [count(jobs[0].parameters.density[i], total) for i in inputs]

    def over(function: Callable, blocks: Any) -> list[torch.Tensor] | None:
        """Sum a count per input over a tensor's blocks; None of an empty tensor."""
        totals = None
        for block in blocks:
            here = [function(i, delta) for i, delta in enumerate(task_vectors(block))]
            totals = here if totals is None else [a + b for a, b in zip(totals, here, strict=True)]
        return totals

    def lows(blocks: Any) -> list[torch.Tensor]:
        counts = [LowHistogram(b) for b, _ in bins]
        for block in blocks:
            for histogram, delta in zip(counts, task_vectors(block), strict=True):
                histogram.add(delta)
        return [histogram.total() for histogram in counts]

    def add(results: dict[str, list]) -> list[torch.Tensor]:
        kept = [r for r in results.values() if r is not None]
        return [sum(r[i] for r in kept) for i in inputs]

    high = add(walk(lambda blocks: over(lambda i, delta: high_histogram(delta).cpu(), blocks)))
    trivial = [k == 0 or k >= total for k in sizes]
    bins = [(0, 0) if trivial[i] else descend(high[i], sizes[i]) for i in inputs]
    low = add(walk(lows))
    whole = [Cut(0, 0) if trivial[i] else cut_at(bins[i][0], low[i], bins[i][1]) for i in inputs]
    equal = walk(lambda blocks: over(
        lambda i, delta: torch.tensor(int((magnitude_bits(delta) == whole[i].threshold).sum())), blocks))
    quotas = [cut.ties for cut in whole]
    cuts: dict[str, list[Cut]] = {}
    for job in sorted(jobs, key=lambda job: job.name):
        row = []
        for i in inputs:
            if trivial[i]:
                row.append(EVERYTHING if sizes[i] else NOTHING)
                continue
            here = min(quotas[i], int(equal[job.name][i])) if equal[job.name] else 0
            quotas[i] -= here
            row.append(Cut(whole[i].threshold, here))
        cuts[job.name] = row
    return cuts


#: method function -> its preparation
PREPARE: dict[str, Callable] = {"ties": ties_over_the_model}
