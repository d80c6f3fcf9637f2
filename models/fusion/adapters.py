"""Fusion of LoRA adapters on their weight changes B A, without the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.adapter_files import Adapter


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact weighted sum of weight changes: sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...].

    Returns:
        module -> (A (sum of ranks, in), B (out, sum of ranks)), scale 1. A module that only some adapters train gets
        their part alone.
    """
    fused = {}
    for module in sorted(set().union(*(adapter.modules for adapter in adapters))):
        parts = [(a.modules[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
        fused[module] = (torch.cat([a for (a, _), _ in parts]), torch.cat([w * b for (_, b), w in parts], 1))
    return fused
