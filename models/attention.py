"""Short-sequence attention for CPUs, registered with transformers as ``cpu_grouped``.

At a few hundred tokens torch's fused CPU kernel spends most of its time in its backward pass; two batched products and
a softmax take a quarter of that (docs/lab-log.md). Query heads that share a key head are stacked along time, so keys and
values are never repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "cpu_grouped"


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """Softmax attention in transformers' interface.

    Args:
        query: (batch, heads, time, dim).
        key, value: (batch, key heads, keys, dim).
        attention_mask: additive, (batch or 1, 1, time, keys); None for no mask.

    Returns:
        (batch, time, heads, dim).
    """
    batch, heads, time, dim = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    stacked = (query * scaling).reshape(batch, key.shape[1], groups * time, dim)
    scores = stacked @ key.mT
    if attention_mask is not None:
        scores = scores.view(batch, key.shape[1], groups, time, keys) + attention_mask[:, :, None, :, :keys]
    weights = scores.softmax(-1).view(batch, key.shape[1], groups * time, keys)
    weights = nn.functional.dropout(weights, dropout, module.training)
    mixed = (weights @ value).view(batch, heads, time, dim)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def implementation(device: torch.device) -> str:
    """The attention to load a model with: ours on a CPU, torch's fused kernels elsewhere."""
    return NAME if device.type == "cpu" else "sdpa"
