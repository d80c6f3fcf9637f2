"""Reinforced Agent Merging: what one input alone changed is kept whole, what several changed is averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.operators.blocks import MemoryBlocks
from models.operators.dense import task_vectors
from models.operators.parameters import Ram, RamPlus


def ram(blocks: MemoryBlocks, parameters: Ram) -> Iterator[Tensor]:
    """theta_base + the mean, entry by entry, of the task vectors whose magnitude is above epsilon (arXiv 2601.13572)."""
    for block in blocks:
        deltas, sharers = _changed(task_vectors(block), parameters.epsilon)
        yield block.required_base.add_(_mean(deltas, sharers, [1.0] * len(deltas)))


def ramplus_tl(blocks: MemoryBlocks, parameters: RamPlus) -> Iterator[Tensor]:
    """RAM whose entries of one input alone are scaled by lambda_i = 1 + r min(shared_i / alone_i, alpha).

    shared_i and alone_i count the entries that input i changed together with others and alone, in this tensor ("tl").
    """
    shared: Counter[int] = Counter()
    alone: Counter[int] = Counter()
    for block in blocks:
        deltas, sharers = _changed(task_vectors(block), parameters.epsilon)
        single = sharers == 1
        for i, delta in enumerate(deltas):
            touched = delta != 0
            own = int((touched & single).sum())
            alone[i] += own
            shared[i] += int(touched.sum()) - own
    # epsilon is the smallest divisor, too: an input that changed nothing alone has the largest ratio, alpha
    ratios = [min(shared[i] / max(alone[i], parameters.epsilon), parameters.alpha) for i in sorted(alone)]
    factors = [1 + parameters.r * ratio for ratio in ratios]
    for block in blocks:
        deltas, sharers = _changed(task_vectors(block), parameters.epsilon)
        yield block.required_base.add_(_mean(deltas, sharers, factors))


def _changed(deltas: list[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Task vectors with 0 where nothing changed, in place, and how many changed each entry."""
    sharers = torch.zeros_like(deltas[0])
    for delta in deltas:
        touched = delta.abs() > epsilon
        delta.mul_(touched)
        sharers.add_(touched)
    return deltas, sharers


def _mean(deltas: Sequence[Tensor], sharers: Tensor, factors: Sequence[float]) -> Tensor:
    single = sharers == 1
    total = torch.zeros_like(sharers)
    for delta, factor in zip(deltas, factors, strict=True):
        # a factor belongs to the entries that the input changed alone
        total.add_(delta if factor == 1 else torch.where(single, delta * factor, delta))
    return total.div_(sharers.clamp_min_(1))
