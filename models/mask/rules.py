"""Merging inside the mask: fused = m * D with D = lambda sum_i I_i delta_i, where TIES and DARE choose the indicators I_i.

In the backward pass the selection counts as constant (spec section 4.5), so D is all that the logit gradient needs, and
every task contributes to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from models.mask.settings import Rule
from models.operators.drop import kept_above
from models.operators.election import disjoint_sum
from models.operators.noise import midpoints, random_bits
from models.operators.selection import EVERYTHING, NOTHING, count, find_cuts, magnitude_of


def combined(rule: Rule, deltas: Sequence[Tensor]) -> list[Tensor]:
    """lambda sum_i delta_i in one tensor where the rule is linear; else the task vectors as they are."""
    if not rule.linear:
        return list(deltas)
    # summed once before training instead of in every forward pass: one tensor to hold and to read, however many tasks
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return [total if rule.lambda_ == 1 else total * rule.lambda_]


def effective(rule: Rule, deltas: Sequence[Tensor], mask: Tensor, thresholds: Sequence[float] | None, draw: str, first: int,
              ) -> Tensor:
    """D of one block, so that the fused task vector is mask * D.

    Args:
        deltas: the block of each task vector, or of ``combined`` ones for linear rules.
        mask: the rescaled mask of the block, broadcastable.
        thresholds: TIES: magnitude from which on a masked entry is kept, per task.
        draw: DARE: key of the noise; another draw with every forward pass.
        first: flat index of the block's first element.
    """
    if rule.linear:
        (total,) = deltas
        return total
    if rule.name == "dare":
        density = 1 - rule.drop  # settings say p, as the paper does; the operators know the share kept
        total = torch.zeros_like(deltas[0], dtype=mask.dtype)
        for i, delta in enumerate(deltas):
            # 16 bits a draw: it is repeated in the backward pass, and half the bits are half the time
            bits = random_bits(f"{draw}|dare{i}", first, delta.numel(), delta.device).view(delta.shape)
            total += delta * kept_above(midpoints(bits, mask.dtype), density)
        # DARE's 1 / density goes with lambda: one product for all tasks
        return total.mul_(rule.lambda_ / density)
    if thresholds is None:
        raise ValueError("TIES needs the thresholds of its tasks")
    masked = [delta * mask for delta in deltas]
    trimmed = [v * (v.abs() >= t) for v, t in zip(masked, thresholds, strict=True)]
    return disjoint_sum(deltas, trimmed).mul_(rule.lambda_)


def ties_thresholds(rule: Rule, walk: Callable[[], Iterable[Sequence[Tensor]]], tasks: int, size: int) -> list[float]:
    """The magnitude of each masked task vector's k-th largest entry over all tensors, k = density x size.

    Entries equal to it are all kept: with continuous masks there is one.
    """
    cuts = [cut for (cut,) in find_cuts(walk, [[count(rule.density, size)]] * tasks, size)]
    return [_magnitude(cut.threshold) for cut in cuts]


def _magnitude(bits: int) -> float:
    if bits == EVERYTHING.threshold:
        return 0.0
    return math.inf if bits == NOTHING.threshold else magnitude_of(bits)
