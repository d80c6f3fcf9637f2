"""Attention registered with transformers: ``cpu_grouped`` for short sequences on CPUs, ``packed`` for rows of many answers.

At a few hundred tokens torch's fused CPU kernel spends most of its time in its backward pass; two batched products and
a softmax take a quarter of that (docs/lab-log.md). Query heads that share a key head are stacked along time, so keys and
values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME, PACKED = "cpu_grouped", "packed"


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """Within it a transformers model computes attention by another kernel, afterwards by its own again."""
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float, dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """Softmax attention in transformers' interface.

    Args:
        query: (batch, heads, time, dim).
        key, value: (batch, key heads, keys, dim).
        attention_mask: additive, (batch or 1, 1, time, keys); None for no mask.
        softcap: scores s become softcap * tanh(s / softcap) before the mask (Gemma 2).
        s_aux: (heads,) a score of each head that takes its share of the weights and gives nothing (gpt-oss's sinks).

    Returns:
        (batch, time, heads, dim).

    Raises:
        ValueError: the model wants a position bias, which would change its scores.
    """
    # refused, not ignored: a soft cap once was, and Gemma 2 computed other scores without a word
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{NAME} attention knows no position_bias, which {type(module).__name__} asks for")
    batch, heads, time, dim = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    # (batch, key heads, groups * time, dim): heads that share a key lie along time, so keys are read as they are
    stacked = (query * scaling).reshape(batch, key.shape[1], groups * time, dim)
    scores = stacked @ key.mT
    # before the mask: tanh would squash its huge negatives to scores that count
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        # (batch, key heads, groups, time, keys); a mask may be made for more keys than there are
        scores = scores.view(batch, key.shape[1], groups, time, keys) + attention_mask[:, :, None, :, :keys]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, key.shape[1], groups, 1, 1).expand(batch, -1, -1, time, 1)
        scores = torch.cat([scores.view(batch, key.shape[1], groups, time, keys), sinks], -1).softmax(-1)[..., :keys]
    weights = (scores if s_aux is not None else scores.softmax(-1)).reshape(batch, key.shape[1], groups * time, keys)
    weights = nn.functional.dropout(weights, dropout, module.training)
    mixed = (weights @ value).view(batch, heads, time, dim)
    # transformers' interface wants time before heads
    return mixed.transpose(1, 2).contiguous(), None


class Spans:
    """Stretches of one packed row that see nothing of each other.

    No dataclass: FSDP copies those on their way into a layer, and ``reached`` would be set on the copy.

    Args:
        places: of each stretch, in the row.
        seen: of each stretch, (its tokens, its tokens) bool: which key a query may look at.
        positions: (tokens of the row,): where each would stand in a row of its own, by which windows are measured.
    """

    def __init__(self, places: list[slice], seen: list[Tensor], positions: Tensor) -> None:
        self.places, self.seen, self.positions = places, seen, positions
        #: Set by the attention: a model that does not hand its arguments on would mix all stretches without a word.
        self.reached = False
        self._masks: dict[tuple[torch.dtype, int | None], list[Tensor]] = {}

    def masks(self, dtype: torch.dtype, window: int | None = None) -> list[Tensor]:
        """Additive masks (1, 1, tokens, tokens), made once for all layers of a window."""
        key = dtype, window
        if key not in self._masks:
            self._masks[key] = [
                additive(seen if window is None else seen & within(self.positions[place], window), dtype)[None, None]
                for place, seen in zip(self.places, self.seen, strict=True)]
        return self._masks[key]


def within(positions: Tensor, window: int) -> Tensor:
    """(n, n) bool: whether a key (column) is one of the last ``window`` tokens that a query (row), itself one, looks at."""
    return positions[:, None] - positions[None] < window


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only ``seen`` (bool, of any shape) counts."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     spans: Spans | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention within each of ``spans``, for one packed row; without them that of ``implementation`` for this device.

    Shapes as in ``grouped_attention``, batch 1. A layer says itself how wide its window is (``sliding_window``).
    """
    whole = ALL_ATTENTION_FUNCTIONS[implementation_for(getattr(module, "config", None), query.device)]
    if spans is None:
        return whole(module, query, key, value, attention_mask, **kwargs)
    # tells ``_scored`` that the model handed its arguments on this far
    spans.reached = True
    # time is the third dimension of (1, heads, time, dim)
    parts = [whole(module, query[:, :, place], key[:, :, place], value[:, :, place], mask, **kwargs)[0]
             for place, mask in zip(spans.places, spans.masks(query.dtype, kwargs.get("sliding_window")), strict=True)]
    return torch.cat(parts, 1), None


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that ``implementation`` wants for this device, for calls without spans."""
    device = torch.device(kwargs.get("device", "cpu"))
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation_for(kwargs.get("config"), device)](*args, **kwargs)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


def implementation(device: torch.device) -> str:
    """The attention of most models: ours on a CPU, torch's fused kernels elsewhere."""
    return NAME if device.type == "cpu" else "sdpa"


def implementation_for(config: Any, device: torch.device) -> str:
    """The attention to load a model with: ours wherever scores are capped (Gemma 2), for the fused kernels know no cap."""
    return NAME if getattr(config, "attn_logit_softcapping", None) is not None else implementation(device)
