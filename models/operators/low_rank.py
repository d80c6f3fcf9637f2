"""Low-rank changes B A: their inner products, and the nearest one to a dense matrix, its residual checked on the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Directions beyond the rank that are sampled too, first width when an energy decides, and power iterations at most.
OVERSAMPLE, FIRST_WIDTH, ITERATIONS = 10, 32, 12
#: A power iteration that captures less than this share more of the squared norm is the last.
SETTLED = 1e-5
#: Below this many rows or columns LAPACK's SVD is as fast as sampling, and exact.
_SMALL = 256
_ROWS = 512
#: Singular values below this share of the largest are rounding: they are not worth a rank.
NEGLIGIBLE = 1e-7

#: Added under the square root of ``differentiable_norm``: at zero change the gradient must be 0, not 0/0.
_TINY = 1e-20

#: A change B A of one module: (A (r, in), B (out, r)).
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fused:
    """A fused module.

    Args:
        pair: (A (r, in), B (out, r)), fp32, scale 1.
        norm: Frobenius norm of the change before it was cut to rank r.
        error: Frobenius norm of what was cut off, divided by ``norm``.
    """

    pair: Pair
    norm: float
    error: float


@dataclass(frozen=True)
class _Triples:
    """Singular triples: u (out, k), values (k,) descending, vh (k, in)."""

    u: Tensor
    values: Tensor
    vh: Tensor


def low_rank(matrix: Tensor, rank: int | None, energy: float | None = None, seed: int = 0) -> Fused:
    """The best B A of a rank, or of an energy, found by sampling (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    Power iterations go on until the captured norm settles; with an energy, the sample doubles until the residual, taken
    on the matrix itself, is small enough. From half the matrix' size on, the SVD is LAPACK's.

    Args:
        matrix: (out, in) fp32.
        rank: of the result; None: as the energy asks.
        energy: share of the squared norm to keep, below 1.

    Returns:
        factors (singular values split evenly), the matrix' norm, and its true relative residual ||D - B A|| / ||D||.
    """
    size = min(matrix.shape)
    # the residual is a difference of squares: it needs the norm in fp64
    total = float(squared_norm(matrix))
    if not total:
        return Fused((matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1)), 0.0, 0.0)
    width = (FIRST_WIDTH if rank is None else rank) + OVERSAMPLE
    while True:
        exact = size <= _SMALL or width >= size / 2
        triples = _exact(matrix) if exact else _sampled(matrix, width, rank, total, seed)
        kept = pick_rank(triples.values, rank or size, energy, total)
        # split evenly, the factors are of one size: neither overflows fp16, and a LoRA optimiser may go on from them
        root = triples.values[:kept].sqrt()
        pair = (root[:, None] * triples.vh[:kept], triples.u[:, :kept] * root)
        error = (residual(matrix, pair) / total) ** 0.5
        if exact or energy is None or kept == rank or 1 - error**2 >= energy:
            return Fused(pair, total**0.5, error)
        width *= 2


def pick_rank(values: Tensor, rank: int, energy: float | None = None, total: float | None = None) -> int:
    """How many singular values to keep: not the negligible ones, not more than ``rank``, enough for ``energy``; at least 1.

    Args:
        values: descending.
        total: squared norm of the whole matrix, where ``values`` are only its largest.
    """
    enough = int((values > NEGLIGIBLE * values[0]).sum())
    if energy is not None:
        captured = values.double().square().cumsum(0)
        enough = min(enough, int((captured < energy * (captured[-1] if total is None else total)).sum()) + 1)
    # a file cannot hold a LoRA of rank 0: a change of zero keeps one direction of zeros
    return max(1, min(enough, rank))


def product(pair: Pair) -> Tensor:
    """B A, (out, in): the change itself, in the factors' type."""
    a, b = pair
    return b @ a


def inner(one: Pair, two: Pair) -> float:
    """<B1 A1, B2 A2> by r x r products, in fp64 because equal adapters cancel."""
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (one, two))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def pair_squared_norm(pair: Pair) -> float:
    """||B A||_F^2 without forming B A; rounding may carry the inner product of a tiny change below 0, which is 0 here."""
    return max(inner(pair, pair), 0.0)


def pair_norm(pair: Pair) -> float:
    """||B A||_F without forming B A."""
    return pair_squared_norm(pair) ** 0.5


def differentiable_norm(a: Tensor, b: Tensor) -> Tensor:
    """(..., r, in), (..., out, r) -> (...): ||B A||_F as ``pair_norm``, in fp32 with a gradient, which is 0 at zero.

    sqrt(trace((B^T B)(A A^T))) needs r x r matrices only. For training: fp64 would cost as much as the layer.
    """
    a, b = a.float(), b.float()
    squared = ((b.mT @ b) * (a @ a.mT)).sum((-1, -2))
    return (squared.clamp_min(0) + _TINY).sqrt() - _TINY**0.5


def squared_norm(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm, summed in fp64 by blocks of rows."""
    return sum((block.double().square().sum() for block in matrix.split(_ROWS)), torch.zeros((), dtype=torch.float64))


def residual(matrix: Tensor, pair: Pair) -> float:
    """||D - B A||^2 by blocks of rows: the dense product never stands in memory."""
    a, b = pair
    return float(sum(squared_norm(rows - rows_of_b @ a)
                     for rows, rows_of_b in zip(matrix.split(_ROWS), b.split(_ROWS), strict=True)))


def _exact(matrix: Tensor) -> _Triples:
    return _Triples(*torch.linalg.svd(matrix, full_matrices=False))


def _sampled(matrix: Tensor, width: int, rank: int | None, total: float, seed: int) -> _Triples:
    """The leading ``width`` singular triples as far as subspace iteration finds them."""
    # drawn on the CPU, so that a result does not depend on the device
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    left = torch.linalg.qr(matrix @ probe).Q
    captured = 0.0
    for step in range(ITERATIONS):
        # D^T Q = right r, hence Q^T D = r^T right^T: its singular values are those of the small r
        right, r = torch.linalg.qr(matrix.T @ left)
        u, values, vh = torch.linalg.svd(r.T)
        now = float(values[: rank or width].double().square().sum())
        if now - captured <= SETTLED * total or step == ITERATIONS - 1:
            break
        captured = now
        left = torch.linalg.qr(matrix @ right).Q
    return _Triples(left @ u, values, vh @ right.T)
