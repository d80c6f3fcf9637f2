"""The weighted sum of low-rank experts as one differentiable function with a hand-written gradient.

A token's k experts are computed as k rows, not all E: z of every expert but the row's own is set to 0, so that one product
with [B_1 .. B_E] adds the right expert's change, whichever it is, and nothing has to be sorted or gathered. Slot by slot,
with e the expert that a token has in that slot and "shrunk" what a LoRA factor A leaves, r numbers a token:

    g = gate + B^g_e z^g_e        u = up + B^u_e z^u_e        h = act(g) u
    mixed = sum_slots w h         shrunk_e = A_e (w h)

Backward, by the chain rule from the bottom line up, d for dL/d:

    d(w h) = d mixed + A_e^T d shrunk_e        dA_e = d shrunk_e^T (w h)
    dw = <d(w h), h>                           dh = w d(w h)
    du = dh act(g)                             dg = dh u act'(g)
    dB^g_e = dg^T z^g_e     dz^g_e = dg B^g_e     d gate = sum_slots dg     and so for u

Autograd would keep a dozen (N, f) tensors a slot and fill as many zero buffers on the way back; this keeps the two that
all slots share, and makes each slot's own anew on the way back.

Shapes: N tokens, E experts, k of them chosen, f intermediate size, r rank of gate and up, q of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ExpertInputs(NamedTuple):
    """What the sum is differentiated by, in the order in which autograd sees it; its gradients come in the same bundle.

    Args:
        gate, up: (N, f), the base's products, which all experts share.
        shrunk_inputs: (N, 2, E, r), z: A x of gate (0) and up (1) for every expert.
        weights: (N, k), of the chosen experts.
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
        dropout_mask: (N, f), zeros and 1 / (1 - p); what rows of A from ``dropped_from`` on read is multiplied by it.
        frozen, frozen_down: columns of B of gate and up, rows of A of down, that come first and train nothing: their
            gradients are 0, and cost nothing.
    """

    activation: Callable[[Tensor], Tensor]
    dropout_mask: Tensor | None = None
    dropped_from: int = 0
    frozen: int = 0
    frozen_down: int = 0


def expert_sum(inputs: ExpertInputs, chosen: Tensor, options: SumOptions) -> tuple[Tensor, Tensor]:
    """sum_e w_e h_e, (N, f) in the dtype of gate and accumulated in fp32 or wider, and A_e (w_e h_e), (N, E, q).

    Args:
        chosen: (N, k), the experts of each token; none twice.
    """
    return ExpertSum.apply(options, chosen, *inputs)


class ExpertSum(torch.autograd.Function):
    """The formulas at the head of this file; call ``expert_sum``."""

    @staticmethod
    def forward(ctx: Any, options: SumOptions, chosen: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, f) and (N, E, q)."""
        inputs = ExpertInputs(*tensors)
        mixed, shrunk = _Sum(), _Sum()
        for slot in _slots(inputs, chosen):
            hidden = (options.activation(slot.gate) * slot.up).mul_(slot.weight)  # w h
            shrunk.add(_shrink(hidden, inputs.down_a, options) * slot.own[..., None])
            mixed.add(hidden)
        # gate and up alone, not each slot's: two (N, f) tensors, however many there are. The mask too, not in ctx:
        # checkpointing lets go of what is saved, and draws it anew
        ctx.save_for_backward(chosen, options.dropout_mask, *inputs)
        ctx.options = replace(options, dropout_mask=None)
        return mixed.total(), shrunk.total()

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor, d_shrunk: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``forward``'s arguments; d_mixed (N, f), d_shrunk (N, E, q)."""
        # asked for once: checkpointing computes them anew, and hands each out a single time
        chosen, mask, *tensors = ctx.saved_tensors
        inputs, options = ExpertInputs(*tensors), replace(ctx.options, dropout_mask=mask)
        spread = [b.mT.flatten(0, 1) for b in (inputs.gate_b, inputs.up_b)]  # (E r, f)
        d_gate, d_up, d_inputs = _Sum(), _Sum(), _Sum()
        d_gate_b, d_up_b, d_down_a = _Sum(), _Sum(), _Sum()
        d_weights = []
        for slot in _slots(inputs, chosen):
            activated, root = _activated(options.activation, slot.gate)
            hidden = activated.detach() * slot.up
            # what reaches this slot's expert, as a row with zeros for the others
            d_own = d_shrunk * slot.own[..., None]  # (N, E, q)
            d_weighted = _shrink_back(d_own, inputs.down_a, options).add_(d_mixed)
            d_down_a.add(_down_gradient(d_own * slot.weight[..., None], hidden, options))
            # a dot product over f entries, f in the thousands
            d_weights.append((d_weighted * hidden).sum(-1, dtype=_wide(hidden)))
            d_hidden = d_weighted.mul_(slot.weight)  # in place: d(w h) is not read again
            d_own_up = d_hidden * activated.detach()
            (d_own_gate,) = torch.autograd.grad(activated, root, d_hidden.mul_(slot.up))
            d_sides = d_own_gate, d_own_up
            for total, d_side, z in zip((d_gate_b, d_up_b), d_sides, slot.z, strict=True):
                # (E (r - frozen), f): the long side of the product last
                total.add(z[..., options.frozen :].flatten(1).mT @ d_side)
            d_inputs.add(torch.stack([d_side @ b.mT for d_side, b in zip(d_sides, spread, strict=True)], 1).view_as(
                inputs.shrunk_inputs) * slot.own[:, None, :, None])
            d_gate.add(d_own_gate)
            d_up.add(d_own_up)
        return None, None, *ExpertInputs(
            d_gate.total(), d_up.total(), d_inputs.total(), torch.stack(d_weights, 1).to(inputs.weights.dtype),
            _whole(d_gate_b.total(), inputs.gate_b.mT, options.frozen).mT,
            _whole(d_up_b.total(), inputs.up_b.mT, options.frozen).mT,
            _whole(d_down_a.total(), inputs.down_a, options.frozen_down))


class _Slot(NamedTuple):
    """One slot of all tokens.

    Args:
        own: (N, E), 1 at the token's expert, in the compute dtype.
        weight: (N, 1), its weight, in the compute dtype.
        z: of gate and of up, (N, E, r) each, 0 but for the token's expert.
        gate, up: g and u, (N, f).
    """

    own: Tensor
    weight: Tensor
    z: tuple[Tensor, Tensor]
    gate: Tensor
    up: Tensor


def _slots(inputs: ExpertInputs, chosen: Tensor) -> Iterator[_Slot]:
    """What a slot's experts start from, slot by slot."""
    # (E r, f): a product of r terms with a B that lies row by row takes a third less time on a CPU
    gate_b, up_b = (b.mT.flatten(0, 1).contiguous() for b in (inputs.gate_b, inputs.up_b))
    for slot in range(chosen.shape[1]):
        own = torch.zeros_like(inputs.shrunk_inputs[:, 0, :, 0]).scatter_(1, chosen[:, slot, None], 1.0)
        z = (inputs.shrunk_inputs * own[:, None, :, None]).unbind(1)
        yield _Slot(own, inputs.weights[:, slot, None].to(own.dtype), z, torch.addmm(inputs.gate, z[0].flatten(1), gate_b),
                    torch.addmm(inputs.up, z[1].flatten(1), up_b))


class _Sum:
    """A sum over slots, rounded once: two terms of a narrow type are added as they are, more in fp32 or wider."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, term: Tensor) -> None:
        """Take over a term; it may be written to."""
        if len(self.terms) == 2:
            # each step of a running sum in bfloat16 would round; the sum of two rounds once
            self.terms = [self.terms[0].to(_wide(term)).add_(self.terms[1]), term]
        else:
            self.terms.append(term)

    def total(self) -> Tensor:
        """The sum, in the dtype of its terms."""
        assert self.terms, "a mixture of no expert"
        first, *rest = self.terms
        # the last term has the dtype of all
        return first.add_(*rest).to(rest[0].dtype) if rest else first


def _activated(activation: Callable[[Tensor], Tensor], gate: Tensor) -> tuple[Tensor, Tensor]:
    """act(g) with a graph of its own, and the g at its root, (N, f) each: autograd gives act', whatever act is."""
    with torch.enable_grad():
        root = gate.detach().requires_grad_()
        return activation(root), root


def _parts(down_a: Tensor, options: SumOptions) -> tuple[Tensor, Tensor]:
    """A of down as rows that read the hidden state itself, and rows that read it behind the dropout mask."""
    return down_a[:, : options.dropped_from], down_a[:, options.dropped_from :]


def _shrink(hidden: Tensor, down_a: Tensor, options: SumOptions) -> Tensor:
    """A h of every expert: (N, f), (E, q, f) -> (N, E, q)."""
    def product(h: Tensor, a: Tensor) -> Tensor:
        return (h @ a.flatten(0, 1).mT).unflatten(1, a.shape[:2])

    if options.dropout_mask is None:
        return product(hidden, down_a)
    plain, dropped = _parts(down_a, options)
    return torch.cat([product(hidden, plain), product(hidden * options.dropout_mask, dropped)], 2)


def _shrink_back(d_shrunk: Tensor, down_a: Tensor, options: SumOptions) -> Tensor:
    """Gradient of ``_shrink`` by h: (N, E, q) -> (N, f)."""
    if options.dropout_mask is None:
        return d_shrunk.flatten(1) @ down_a.flatten(0, 1)
    plain, dropped = _parts(down_a, options)
    d_plain, d_dropped = d_shrunk.split([plain.shape[1], dropped.shape[1]], 2)
    return torch.addcmul(d_plain.flatten(1) @ plain.flatten(0, 1), d_dropped.flatten(1) @ dropped.flatten(0, 1),
                         options.dropout_mask)


def _down_gradient(d_shrunk: Tensor, hidden: Tensor, options: SumOptions) -> Tensor:
    """Gradient of ``_shrink`` by the rows of A that train: (N, E, q), (N, f) -> (E (q - frozen), f)."""
    trained = d_shrunk[:, :, options.frozen_down :]
    if options.dropout_mask is None:
        return trained.flatten(1).mT @ hidden
    kept = max(options.dropped_from - options.frozen_down, 0)
    d_plain, d_dropped = trained.split([kept, trained.shape[2] - kept], 2)
    parts = ((d_plain, hidden), (d_dropped, hidden * options.dropout_mask))
    return torch.cat([(d.flatten(1).mT @ h).unflatten(0, (d_shrunk.shape[1], -1)) for d, h in parts], 1).flatten(0, 1)


def _whole(trained: Tensor, like: Tensor, frozen: int) -> Tensor:
    """(E (q - frozen), f) with rows of 0 for those that train nothing: (E, q, f), like ``like``."""
    found = trained.unflatten(0, (len(like), -1)) if trained.numel() else like.new_zeros(len(like), 0, like.shape[2])
    return torch.cat([found.new_zeros(len(like), frozen, like.shape[2]), found], 1) if frozen else found


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
