"""The weighted sum of low-rank experts as one differentiable function with a hand-written gradient.

Autograd would keep a dozen (N, f) tensors per expert and fill as many zero buffers on the way back; this keeps the two that
all experts share, makes each expert's own anew on the way back, and adds in place.

Forward, for expert e ("shrunk" is what a LoRA factor A leaves, r numbers a token):

    g_e = gate + B^g_e z^g_e        u_e = up + B^u_e z^u_e        h_e = act(g_e) u_e
    mixed = sum_e w_e h_e           shrunk_e = A_e (w_e h_e)

Backward, by the chain rule from the bottom line up, d for dL/d:

    d(w_e h_e) = d mixed + A_e^T d shrunk_e        dA_e = d shrunk_e^T (w_e h_e)
    dw_e = <d(w_e h_e), h_e>                       dh_e = w_e d(w_e h_e)
    du_e = dh_e act(g_e)                           dg_e = dh_e u_e act'(g_e)
    dB^g_e = dg_e^T z^g_e     dz^g_e = dg_e B^g_e     d gate = sum_e dg_e     and so for u

Shapes: N tokens, n those of one expert (N unless gathered), E experts, f intermediate size, r rank of gate and up, q of
down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ExpertInputs(NamedTuple):
    """What the sum is differentiated by, in the order in which autograd sees it; its gradients come in the same bundle.

    Args:
        gate, up: (N, f), the base's products, which all experts share.
        shrunk_inputs: (N, 2, E, r), z: A x of gate (0) and up (1) for every expert.
        weights: (N, E), zero where a token did not choose the expert.
        gate_b, up_b: (E, f, r), B of gate and up.
        down_a: (E, q, f), A of down.
    """

    gate: Tensor
    up: Tensor
    shrunk_inputs: Tensor
    weights: Tensor
    gate_b: Tensor
    up_b: Tensor
    down_a: Tensor


@dataclass(frozen=True)
class SumOptions:
    """How the sum is computed; nothing of it has a gradient.

    Args:
        activation: of the FFN, elementwise.
        gather: compute each expert on its own tokens only, instead of on all with weight zero.
        dropout_mask: (N, f), zeros and 1 / (1 - p); what rows of A from ``dropped_from`` on read is multiplied by it.
        frozen, frozen_down: columns of B of gate and up, rows of A of down, that come first and train nothing. The kernels
            leave them out; here their gradients cost no more than the others' and are made.
    """

    activation: Callable[[Tensor], Tensor]
    gather: bool = False
    dropout_mask: Tensor | None = None
    dropped_from: int = 0
    frozen: int = 0
    frozen_down: int = 0


def expert_sum(inputs: ExpertInputs, options: SumOptions) -> tuple[Tensor, Tensor]:
    """sum_e w_e h_e, (N, f) in the dtype of gate and accumulated in fp32 or wider, and A_e (w_e h_e), (N, E, q)."""
    return ExpertSum.apply(options, *inputs)


class ExpertSum(torch.autograd.Function):
    """The formulas at the head of this file; call ``expert_sum``."""

    @staticmethod
    def forward(ctx: Any, options: SumOptions, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, f) and (N, E, q)."""
        inputs = ExpertInputs(*tensors)
        experts = inputs.weights.shape[1]
        # of many experts each adds a little: a running sum in bfloat16 would round the last ones away
        mixed = _Sum(inputs.gate)
        shrunk = inputs.gate.new_zeros(len(inputs.gate), experts, inputs.down_a.shape[1])
        # (E, r, f): a product of r terms with a B that lies row by row takes a third less time on a CPU
        rows_of_b = inputs.gate_b.mT.contiguous(), inputs.up_b.mT.contiguous()
        rows_of = [inputs.weights[:, e].nonzero().squeeze(-1) for e in range(experts)] if options.gather else []
        for e in range(experts):
            rows = rows_of[e] if options.gather else None
            gate, up = _gate_and_up(inputs, rows_of_b, e, rows)
            hidden = options.activation(gate) * up
            # in place: from here on w_e h_e
            hidden *= _pick(inputs.weights[:, e], rows)[:, None].to(hidden.dtype)
            mixed.add(rows, hidden)
            _put(shrunk, e, rows, _shrink(hidden, inputs.down_a[e], _mask_of(options, rows), options.dropped_from))
        # gate and up alone, not each expert's: two (N, f) tensors, however many experts there are
        # the mask too, not in ctx: checkpointing lets go of what is saved, and draws it anew
        ctx.save_for_backward(*inputs, options.dropout_mask, *rows_of)
        ctx.options = replace(options, dropout_mask=None)
        return mixed.total(inputs.gate.dtype), shrunk

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor, d_shrunk: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``forward``'s arguments; d_mixed (N, f), d_shrunk (N, E, q)."""
        # asked for once: checkpointing computes them anew, and hands each out a single time
        saved, fields = ctx.saved_tensors, len(ExpertInputs._fields)
        inputs, mask, rows_of = ExpertInputs(*saved[:fields]), saved[fields], saved[fields + 1 :]
        options = replace(ctx.options, dropout_mask=mask)
        _, _, shrunk_inputs, weights, gate_b, up_b, down_a = inputs
        experts = weights.shape[1]
        rows_of_b = gate_b.mT.contiguous(), up_b.mT.contiguous()
        # every expert adds to these two, as to ``mixed`` in the forward pass
        d_gate, d_up = _Sum(d_mixed), _Sum(d_mixed)
        # zeros, not empty: gathered experts leave the rows of other tokens untouched
        d_inputs, d_weights, d_gate_b, d_up_b, d_down_a = (
            torch.zeros_like(t) for t in (shrunk_inputs, weights, gate_b, up_b, down_a))
        for e in range(experts):
            rows = rows_of[e] if options.gather else None
            weight = _pick(weights[:, e], rows).to(shrunk_inputs.dtype)[:, None]
            own_gate, own_up = _gate_and_up(inputs, rows_of_b, e, rows)
            activated, root = _activated(options.activation, own_gate)
            hidden = activated.detach() * own_up
            d_weighted, d_down_a[e] = _shrink_backward(_pick(d_shrunk[:, e], rows), hidden * weight, down_a[e],
                                                       _mask_of(options, rows), options.dropped_from)
            d_weighted = _pick(d_mixed, rows) + d_weighted
            # a dot product over f entries, f in the thousands
            _put(d_weights, e, rows, (d_weighted * hidden).sum(-1, dtype=_wide(hidden)).to(weights.dtype))
            d_hidden = d_weighted.mul_(weight)  # in place: d(w_e h_e) is not read again
            d_own_up = d_hidden * activated.detach()
            (d_own_gate,) = torch.autograd.grad(activated, root, d_hidden.mul_(own_up))
            shrunk_gate, shrunk_up = _pick(shrunk_inputs[:, :, e], rows).unbind(1)
            d_gate_b[e], d_up_b[e] = d_own_gate.mT @ shrunk_gate, d_own_up.mT @ shrunk_up
            _put(d_inputs[:, 0], e, rows, d_own_gate @ gate_b[e])
            _put(d_inputs[:, 1], e, rows, d_own_up @ up_b[e])
            d_gate.add(rows, d_own_gate)
            d_up.add(rows, d_own_up)
        return None, *ExpertInputs(gate=d_gate.total(d_mixed.dtype), up=d_up.total(d_mixed.dtype), shrunk_inputs=d_inputs,
                                   weights=d_weights, gate_b=d_gate_b, up_b=d_up_b, down_a=d_down_a)


class _Sum:
    """A sum over experts, (N, f), accumulated in fp32 or wider; ``like`` gives shape, dtype and device of the terms."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add(self, rows: Tensor | None, term: Tensor) -> None:
        """Add an expert's (n, f) to the rows of its tokens, None: to all."""
        wide = term.to(_wide(term))
        if rows is not None:
            if self.sum is None:
                self.sum = torch.zeros(self.like.shape, dtype=wide.dtype, device=wide.device)
            self.sum.index_add_(0, rows, wide)
        elif self.sum is None:
            # to() gives the term itself where it is wide already, and the term is not ours to add to
            self.sum = wide.clone() if wide is term else wide
        else:
            self.sum += wide

    def total(self, dtype: torch.dtype) -> Tensor:
        """The sum, (N, f), rounded once."""
        assert self.sum is not None, "a mixture of no expert"
        return self.sum.to(dtype)


def _gate_and_up(inputs: ExpertInputs, rows_of_b: tuple[Tensor, Tensor], expert: int, rows: Tensor | None,
                 ) -> tuple[Tensor, Tensor]:
    """g_e and u_e, (n, f) each; rows_of_b: B of gate and up, (E, r, f)."""
    shrunk_gate, shrunk_up = (_pick(inputs.shrunk_inputs[:, side, expert], rows) for side in (0, 1))
    return (torch.addmm(_pick(inputs.gate, rows), shrunk_gate, rows_of_b[0][expert]),
            torch.addmm(_pick(inputs.up, rows), shrunk_up, rows_of_b[1][expert]))


def _activated(activation: Callable[[Tensor], Tensor], gate: Tensor) -> tuple[Tensor, Tensor]:
    """act(g_e) with a graph of its own, and the g_e at its root, (n, f) each: autograd gives act', whatever act is."""
    with torch.enable_grad():
        root = gate.detach().requires_grad_()
        return activation(root), root


def _shrink(hidden: Tensor, down_a: Tensor, mask: Tensor | None, dropped_from: int) -> Tensor:
    """A h, (n, f), (q, f) -> (n, q); with a mask (n, f), rows of A from ``dropped_from`` on read the masked h."""
    if mask is None:
        return hidden @ down_a.mT
    return torch.cat([hidden @ down_a[:dropped_from].mT, (hidden * mask) @ down_a[dropped_from:].mT], 1)


def _shrink_backward(d_shrunk: Tensor, hidden: Tensor, down_a: Tensor, mask: Tensor | None, dropped_from: int,
                     ) -> tuple[Tensor, Tensor]:
    """Gradients of ``_shrink`` by h, (n, f), and by A, (q, f); d_shrunk (n, q)."""
    if mask is None:
        return d_shrunk @ down_a, d_shrunk.mT @ hidden
    d_plain, d_dropped = d_shrunk[:, :dropped_from], d_shrunk[:, dropped_from:]
    return (d_plain @ down_a[:dropped_from] + (d_dropped @ down_a[dropped_from:]) * mask,
            torch.cat([d_plain.mT @ hidden, d_dropped.mT @ (hidden * mask)]))


def _mask_of(options: SumOptions, rows: Tensor | None) -> Tensor | None:
    """The dropout mask of an expert's tokens, (n, f)."""
    return None if options.dropout_mask is None else _pick(options.dropout_mask, rows)


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """tensor[rows]; the tensor itself, no copy, for all rows (None)."""
    return tensor if rows is None else tensor.index_select(0, rows)


def _put(target: Tensor, expert: int, rows: Tensor | None, value: Tensor) -> None:
    """target[rows, expert] = value."""
    if rows is None:
        target[:, expert] = value
    else:
        target[rows, expert] = value
