"""Cross-entropy through a frozen output head, chunk by chunk, without ever holding all logits.

The gradient with respect to the hidden states is formed while a chunk's probabilities are at hand, so the backward pass
costs one multiplication and memory stays at one chunk of (rows, vocabulary).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base.heads import LogitRule

#: Rows of logits at a time: 256 x 49k fp32 is 50 MB.
CHUNK = 256


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of ``rule(hidden @ weight.T + bias)`` against targets.

    Args (of apply):
        hidden: (rows, d), in the compute dtype.
        weight: (vocabulary, d), frozen.
        targets: (rows,) ids.
        bias: (vocabulary,), frozen, or None.
        rule: scale and cap of the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
                rule: LogitRule = LogitRule()) -> Tensor:  # noqa: B008 - frozen
        # fp32 or wider: a bfloat16 sum of thousands of tokens stops growing once a term is below its last bit
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        # formed now, while a chunk's probabilities are there; keeping them for later would cost (rows, vocabulary)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            # multiplied in the compute dtype, summed over the vocabulary in fp32: bfloat16 has two to three digits
            logits = rule(F.linear(hidden[rows], weight, bias).to(wide))
            # d logits / d products, times scale below: 1 - tanh^2, read off the capped logits themselves
            slope = None if gradient is None or rule.cap is None else 1 - (logits / rule.cap).square()
            # in place from here on: a second buffer of this size is what the chunks are there to avoid
            logits -= logits.logsumexp(-1, keepdim=True)
            target_ids = targets[rows, None]
            total -= logits.gather(1, target_ids).sum()
            if gradient is not None:
                # softmax minus one-hot, in place
                logits.exp_().scatter_add_(1, target_ids, torch.full_like(target_ids, -1, dtype=logits.dtype))
                if slope is not None:
                    logits *= slope
                if rule.scale != 1.0:
                    logits *= rule.scale
                torch.matmul(logits.to(weight.dtype), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_total.to(gradient.dtype), None, None, None, None


def answer_loss(hidden: Tensor, head: torch.nn.Module, targets: Tensor, rule: LogitRule | None = None) -> Tensor:
    """Summed cross-entropy (scalar, fp32 or wider) of the answer tokens; a head that trains takes torch's own path.

    So does a head under a LoRA, as a wrapper or a hook: its weight alone is not what it computes.

    Args:
        hidden: (rows, d).
        targets: (rows,) ids.
        rule: scale and cap of the model's logits (``models/base/heads.py``).
    """
    rule = rule or LogitRule()
    changed = type(head) is not torch.nn.Linear or head._forward_hooks
    if changed or any(parameter.requires_grad for parameter in head.parameters()):
        return F.cross_entropy(rule(head(hidden).float()), targets, reduction="sum")
    # the head's own dtype decides, not the caller's autocast, which would round an fp32 head
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearCrossEntropy.apply(hidden.to(head.weight.dtype), head.weight, targets, head.bias, rule)
