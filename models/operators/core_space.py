"""The small space that LoRA changes share: sums of B A live between a few output axes and a few input axes.

All changes B_i A_i of one module lie in the span of [B_1 .. B_n] on the output side and of [A_1; ..; A_n] on the input side,
so that with k = sum of ranks everything is a k x k matrix there, without loss (Core Space, arXiv 2509.17786):
B_i A_i = L M_i R^T, L and R orthonormal. Two thin QR decompositions and products of k x k matrices, no out x in matrix.

Entry-wise rules (trim, drop, elect) depend on the axes, and a QR decomposition's axes depend on how the factors happen to be
written: (B Q, Q^-1 A) is the same change. The axes here are therefore those of the changes themselves: L are the left
singular vectors of [B_1 A_1, .., B_n A_n] (which are KnOTS' axes, arXiv 2410.19735), R the right ones of
[B_1 A_1; ..; B_n A_n]. They are unique up to signs, which no rule sees, when singular values differ; so every method that
works here is a function of the changes B_i A_i, their weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.operators.low_rank import Fused, Pair, pick_rank, product


@dataclass(frozen=True)
class Core:
    """Changes of one module in shared axes: B_i A_i = left @ tasks[i] @ right.T; fp64.

    Args:
        left: (out, k) orthonormal columns; None: the output axes themselves.
        tasks: per adapter, (k, l).
        right: (in, l) orthonormal columns; None: the input axes themselves.
    """

    left: Tensor | None
    tasks: list[Tensor]
    right: Tensor | None


def project(pairs: Sequence[Pair], space: str) -> Core:
    """The changes of one module in a space.

    Args:
        space: core: shared axes on both sides; left: shared output axes, plain inputs (KnOTS); dense: B A itself.
    """
    if space == "dense":
        return Core(None, [product(pair) for pair in pairs], None)
    ranks = [a.shape[0] for a, _ in pairs]
    # fp64: axes of singular values close to each other turn with the rounding, and entry-wise rules see it
    out_axes, out_parts = torch.linalg.qr(torch.cat([b for _, b in pairs], 1).double())
    in_axes, in_parts = torch.linalg.qr(torch.cat([a for a, _ in pairs]).double().T)
    tasks = [b @ a.T for b, a in zip(out_parts.split(ranks, 1), in_parts.split(ranks, 1), strict=True)]
    # from the QR's axes, which depend on how factors are written, to the changes' own
    left = _axes(torch.cat(tasks, 1))
    if space == "left":
        return Core(out_axes @ left, [left.T @ task @ in_axes.T for task in tasks], None)
    right = _axes(torch.cat(tasks).T)
    return Core(out_axes @ left, [left.T @ task @ right for task in tasks], in_axes @ right)


def _axes(stacked: Tensor) -> Tensor:
    """Left singular vectors of what is there: without the empty axes, factors padded with zeros give the same space."""
    u, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    return u[:, : pick_rank(values, len(values))]


def cut(core: Core, merged: Tensor, rank: int, energy: float | None = None) -> Fused:
    """A merged matrix of the core back as factors, cut to a rank or to an energy; singular values split evenly.

    Args:
        merged: (k, l), in the axes of ``core``, whose left axes are shared ones.
        rank: at most; what is negligible takes none.
        energy: share of the squared norm to keep, with as few ranks as that takes.
    """
    u, values, vh = torch.linalg.svd(merged.double(), full_matrices=False)
    # the core has the changes' own singular values: what is cut here is cut from the whole
    kept = pick_rank(values, rank, energy)
    root = values[:kept].sqrt()
    # back to out and in last: the large axes meet a matrix of the final rank only
    b, a = u[:, :kept] * root, root[:, None] * vh[:kept]
    total, lost = float(values.norm()), float(values[kept:].norm())
    pair = ((a if core.right is None else a @ core.right.T).float(), (core.left @ b).float())
    return Fused(pair, total, lost / total if total else 0.0)
