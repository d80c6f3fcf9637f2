"""The short last step of an epoch of preference pairs, shared out among processes.

accelerate fills it up with pairs of the epoch's start, so that every process has a batch. Here those are taken out again and
what is left is weighted, so that the mean over processes and micro-batches is the mean over the step's own pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """A process's part of a micro-batch: its first ``real`` pairs count, and the loss of all of them ``weight`` times."""

    real: int
    weight: float


def part_of(rows: int, batch: int, processes: int, accumulation: int, step: int, micro: int, rank: int) -> Part | None:
    """What of a micro-batch is a process's own; None where all of it is, as in every step but an epoch's last.

    Args:
        rows: pairs of an epoch.
        batch: pairs of a process's micro-batch.
        accumulation: micro-batches of a full step.
        step: steps taken before.
        micro: micro-batches of this step before this one.
    """
    group = batch * processes * accumulation
    steps = -(-rows // group)
    left = rows - (steps - 1) * group
    if step % steps < steps - 1 or left == group:
        return None
    # accelerate deals batches out one by one: the first to the first process, the next to the next
    real = min(max(left - (micro * processes + rank) * batch, 0), batch)
    taken = -(-left // (batch * processes))
    return Part(real, processes * taken * real / left)


def own_pairs(inputs: dict[str, Any], real: int) -> dict[str, Any]:
    """The first pairs of a batch, one at least: a process that has none computes with it and counts it 0 times.

    Args:
        inputs: TRL's: rows of chosen answers and behind them as many of rejected ones, or a value for each pair.
    """
    pairs, kept = len(inputs["input_ids"]) // 2, max(real, 1)

    def cut(value: Any) -> Any:
        if not torch.is_tensor(value) or not value.ndim:
            return value
        if len(value) == 2 * pairs:
            return torch.cat([value[:kept], value[pairs : pairs + kept]])
        return value[:kept] if len(value) == pairs else value

    return {name: cut(value) for name, value in inputs.items()}
