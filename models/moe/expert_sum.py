"""The weighted sum of low-rank experts as one differentiable function with a hand-written gradient.

Autograd would keep a dozen (tokens, intermediate) tensors per expert and fill as many zero buffers on the way back; this
keeps two per expert, adds in place, and reads its inputs once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ExpertSum(torch.autograd.Function):
    """sum_e w_e h_e and the inner products A_e (w_e h_e), with h_e = act(gate + B^g_e z^g_e) * (up + B^u_e z^u_e).

    Shapes: gate, up (tokens, f); inner (tokens, 2, experts, r), the z of gate and up; weights (tokens, experts), zero
    where an expert is not chosen; gate_b, up_b (experts, f, r); down_a (experts, r', f). Returns (tokens, f) in the
    dtype of gate, accumulated in fp32, and (tokens, experts, r'). With dropout, ``mask`` (tokens, f) is applied to
    what the rows of A from ``dropped_from`` on read.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, inner: Tensor, weights: Tensor, gate_b: Tensor, up_b: Tensor,
                down_a: Tensor, act: Callable[[Tensor], Tensor], gather: bool,
                mask: Tensor | None = None, dropped_from: int = 0) -> tuple[Tensor, Tensor]:
        experts = weights.shape[1]
        total = torch.zeros(gate.shape, dtype=_wide(gate), device=gate.device)
        shrunk = gate.new_zeros(len(gate), experts, down_a.shape[1])
        kept: list[Tensor] = []
        rows_of = [weights[:, e].nonzero().squeeze(-1) if gather else None for e in range(experts)]
        for e, rows in enumerate(rows_of):
            g = torch.addmm(_pick(gate, rows), _pick(inner[:, 0, e], rows), gate_b[e].mT)
            u = torch.addmm(_pick(up, rows), _pick(inner[:, 1, e], rows), up_b[e].mT)
            h = act(g) * u
            h *= _pick(weights[:, e], rows).to(h.dtype)[:, None]
            _add(total, rows, h)
            _put(shrunk, e, rows, _shrink(h, down_a[e], mask if mask is None else _pick(mask, rows), dropped_from))
            kept += [g, u]
        ctx.save_for_backward(inner, weights, gate_b, up_b, down_a, *kept, *(r for r in rows_of if r is not None))
        ctx.act, ctx.gather, ctx.mask, ctx.dropped_from = act, gather, mask, dropped_from
        return total.to(gate.dtype), shrunk

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_shrunk: Tensor) -> tuple[Tensor | None, ...]:
        inner, weights, gate_b, up_b, down_a, *kept = ctx.saved_tensors
        experts = weights.shape[1]
        d_gate = torch.zeros(d_total.shape, dtype=_wide(d_total), device=d_total.device)
        d_up = torch.zeros_like(d_gate)
        d_inner, d_weights = torch.zeros_like(inner), torch.zeros_like(weights)
        d_gate_b, d_up_b, d_down_a = (torch.zeros_like(t) for t in (gate_b, up_b, down_a))
        for e in range(experts):
            rows = kept[2 * experts + e] if ctx.gather else None
            w = _pick(weights[:, e], rows).to(inner.dtype)[:, None]
            ds = _pick(d_shrunk[:, e], rows)
            u = kept[2 * e + 1]
            # the activation's own gradient, whatever the activation
            with torch.enable_grad():
                g = kept[2 * e].detach().requires_grad_()
                a = ctx.act(g)
            h = a.detach() * u
            mask = None if ctx.mask is None else _pick(ctx.mask, rows)
            through, d_down_a[e] = _shrink_backward(ds, h * w, down_a[e], mask, ctx.dropped_from)
            dh = _pick(d_total, rows) + through
            _put(d_weights, e, rows, (dh * h).sum(-1, dtype=_wide(h)).to(weights.dtype))
            dh *= w
            du = dh * a.detach()
            (dg,) = torch.autograd.grad(a, g, dh * u)
            z = _pick(inner[:, :, e], rows)
            d_gate_b[e], d_up_b[e] = dg.mT @ z[:, 0], du.mT @ z[:, 1]
            _put(d_inner[:, 0], e, rows, dg @ gate_b[e])
            _put(d_inner[:, 1], e, rows, du @ up_b[e])
            _add(d_gate, rows, dg)
            _add(d_up, rows, du)
        return (d_gate.to(d_total.dtype), d_up.to(d_total.dtype), d_inner, d_weights, d_gate_b, d_up_b, d_down_a,
                None, None, None, None)


def _shrink(h: Tensor, a: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """A h; with a mask, rows of A from ``start`` on read the masked h."""
    if mask is None:
        return h @ a.mT
    return torch.cat([h @ a[:start].mT, (h * mask) @ a[start:].mT], 1)


def _shrink_backward(ds: Tensor, h: Tensor, a: Tensor, mask: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``_shrink`` with respect to h and A."""
    if mask is None:
        return ds @ a, ds.mT @ h
    first, second = ds[:, :start], ds[:, start:]
    return (first @ a[:start] + (second @ a[start:]) * mask,
            torch.cat([first.mT @ h, second.mT @ (h * mask)]))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: fp32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(target: Tensor, rows: Tensor | None, value: Tensor) -> None:
    if rows is None:
        target += value
    else:
        target.index_add_(0, rows, value.to(target.dtype))


def _put(target: Tensor, expert: int, rows: Tensor | None, value: Tensor) -> None:
    """target[rows, expert] = value."""
    if rows is None:
        target[:, expert] = value
    else:
        target[rows, expert] = value

