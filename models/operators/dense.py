"""Merges without sparsity. Those on the sphere need only the inputs' Gram matrix: one walk to measure, one to combine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.operators.blocks import Block, MemoryBlocks
from models.operators.drop import drop_, kept_below
from models.operators.parameters import (
    Interpolation,
    Linear,
    ModelStock,
    NoParameters,
    Resta,
    Slerp,
    Sphere,
    TaskArithmetic,
)

#: Above this cosine, inputs count as parallel and SLERP is a straight line (its sines would lose their digits).
PARALLEL = 0.9995


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, in place of the first tensor: a merge of many inputs needs no buffer beside them."""
    total = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        # multiplied and added in one pass over memory, which is what a merge waits for
        total.add_(tensor, alpha=weight)
    return total


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """The sum of the weights, or 1 when it is not wanted or is 0."""
    # weights such as 0.1 + 0.2 - 0.3 sum to 0 in exact arithmetic only; dividing by the rest would blow the merge up
    total = math.fsum(weights)
    return total if normalize and abs(total) > 1e-8 else 1.0


def linear(blocks: MemoryBlocks, parameters: Linear) -> Iterator[Tensor]:
    """sum_i w_i theta_i, divided by sum_i w_i unless told otherwise."""
    # divided before and not after the sum: one pass less over every tensor
    scale = divisor(parameters.weight, parameters.normalize)
    for block in blocks:
        yield weighted_sum(block.experts, [w / scale for w in parameters.weight])


def passthrough(blocks: MemoryBlocks, parameters: NoParameters) -> Iterator[Tensor]:
    """The input as it is."""
    for block in blocks:
        yield block.experts[0]


def task_vectors(block: Block) -> list[Tensor]:
    """theta_i - theta_base, in place of the experts."""
    return [expert.sub_(block.base) for expert in block.experts]


def task_arithmetic(blocks: MemoryBlocks, parameters: TaskArithmetic) -> Iterator[Tensor]:
    """theta_base + lambda sum_i w_i (theta_i - theta_base) (Ilharco et al. 2023, equation 1)."""
    scale = parameters.lambda_ / divisor(parameters.weight, parameters.normalize)
    for block in blocks:
        yield block.base.add_(weighted_sum(task_vectors(block), parameters.weight), alpha=scale)


def wise_ft(blocks: MemoryBlocks, parameters: Interpolation) -> Iterator[Tensor]:
    """(1 - alpha) theta_base + alpha theta (Wortsman et al. 2022, equation 1)."""
    for block in blocks:
        yield block.base.lerp_(block.experts[0], parameters.alpha)


def resta(blocks: MemoryBlocks, parameters: Resta) -> Iterator[Tensor]:
    """theta_task + gamma (theta_aligned - theta_unaligned); base: the aligned model, inputs: task, unaligned.

    With a density below 1 the task vector theta_task - theta_aligned passes DARE first (Bhardwaj et al. 2024).
    """
    for block in blocks:
        task, unaligned = task_vectors(block)
        if parameters.density < 1:
            drop_(task, kept_below(blocks.uniform(0, block), parameters.density), parameters.density)
        yield block.base.add_(task).add_(unaligned, alpha=-parameters.gamma)


def gram(walk: Iterable[Sequence[Tensor]]) -> Tensor:
    """Inner products of the inputs, (n, n) fp64; fp32 within a block, fp64 between blocks, in order.

    A block is short enough for fp32 (2**18 products); over a tensor of billions the rounding would drown small angles.
    """
    total = None
    for values in walk:
        flat = [v.reshape(-1) for v in values]
        total = torch.zeros(len(flat), len(flat), dtype=torch.float64) if total is None else total
        for i, j in itertools.combinations_with_replacement(range(len(flat)), 2):
            total[i, j] += float(flat[i] @ flat[j])
    if total is None:
        return torch.zeros(0, 0, dtype=torch.float64)
    return total + total.triu(1).T


def slerp(blocks: MemoryBlocks, parameters: Slerp) -> Iterator[Tensor]:
    """The arc from the base (t = 0) to the input (t = 1): sin((1-t) a)/sin(a) theta_0 + sin(t a)/sin(a) theta_1.

    a is the angle between the two as vectors, one per tensor; nearly parallel ones (|cos a| > 0.9995) are interpolated.
    """
    g = gram((block.base, block.experts[0]) for block in blocks)
    # a zero vector has no direction: the straight line is all that is left
    first, second = 1 - parameters.t, parameters.t
    if len(g) and g[0, 0] > 0 and g[1, 1] > 0:
        cosine = float(g[0, 1] / (g[0, 0] * g[1, 1]).sqrt())
        if abs(cosine) <= PARALLEL:
            angle = math.acos(cosine)
            first, second = (math.sin(s * angle) / math.sin(angle) for s in (1 - parameters.t, parameters.t))
    for block in blocks:
        yield weighted_sum([block.base, *block.experts], (first, second))


def karcher_coefficients(g: Tensor, weights: Sequence[float], steps: int = 200, tolerance: float = 1e-12) -> Tensor:
    """Coefficients c of the weighted Karcher mean sum_i c_i u_i of unit vectors with Gram matrix g, (n,) fp64.

    The mean lies in the span of the inputs, so the fixed-point iteration mu <- exp_mu(sum_i w_i log_mu(u_i)) runs on
    coefficients alone and never touches the vectors.

    Raises:
        ValueError: the weighted sum is 0 (opposite inputs), so that no mean direction exists.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    # the start is the normalised chordal mean, which is within a few degrees of the Karcher mean already
    c = w.clone()
    norm = float(c @ g @ c) ** 0.5
    if norm < 1e-9:
        raise ValueError("the weighted directions cancel; change the weights")
    c /= norm
    for _ in range(steps):
        # <u_i, mu>: rounding may carry it past 1, where acos is NaN
        cosines = (g @ c).clamp(-1, 1)
        angles = cosines.acos()
        # log_mu(u) = a / sin(a) (u - cos(a) mu); the factor tends to 1 at a = 0
        factors = torch.where(angles > 1e-8, angles / angles.sin().clamp_min(1e-300), torch.ones_like(angles)) * w
        tangent = factors - (factors @ cosines) * c
        length = max(float(tangent @ g @ tangent), 0.0) ** 0.5
        if length < tolerance:
            break
        c = math.cos(length) * c + (math.sin(length) / length) * tangent
    return c


def karcher(blocks: MemoryBlocks, parameters: Sphere) -> Iterator[Tensor]:
    """n-way SLERP: the weighted Karcher mean of the directions, with the weighted mean of the norms."""
    g = gram(block.experts for block in blocks)
    coefficients = _on_sphere(g, parameters.weight, karcher_coefficients)
    for block in blocks:
        yield weighted_sum(block.experts, coefficients)


def multislerp(blocks: MemoryBlocks, parameters: Sphere) -> Iterator[Tensor]:
    """The normalised weighted mean of the directions (of task vectors, when there is a base), with the mean norm."""
    directions = (task_vectors(b) if b.base is not None else b.experts for b in blocks)
    # no step of the iteration: its start is the normalised mean
    coefficients = _on_sphere(gram(directions), parameters.weight, lambda g, w: karcher_coefficients(g, w, steps=0))
    for block in blocks:
        if block.base is None:
            yield weighted_sum(block.experts, coefficients)
        else:
            yield block.base.add_(weighted_sum(task_vectors(block), coefficients))


def _on_sphere(g: Tensor, weights: Sequence[float], direction: object) -> list[float]:
    """Coefficients on the raw inputs, from those on their directions; inputs that are all zero get the plain mean."""
    total = math.fsum(weights)
    norms = g.diagonal().sqrt()
    if not len(g) or bool((norms == 0).any()):
        return [w / total for w in weights]
    unit = g / torch.outer(norms, norms)
    length = sum(w / total * float(n) for w, n in zip(weights, norms, strict=True))
    return (direction(unit, weights) * length / norms).tolist()


def model_stock(blocks: MemoryBlocks, parameters: ModelStock) -> Iterator[Tensor]:
    """t mean(theta_i) + (1 - t) theta_base, t = n c / (1 + (n - 1) c) (Jang et al. 2024, equation 7).

    c is the mean pairwise cosine of the task vectors, of the whole tensor or of each output row (``filter_wise``).
    """
    ratio = None if parameters.filter_wise else _stock_ratio(gram(task_vectors(block) for block in blocks))
    for block in blocks:
        deltas = task_vectors(block)
        ratios = _row_ratios(deltas) if ratio is None else ratio  # before the sum, which overwrites the first delta
        mean = weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
        # theta_base + t (mean - theta_base): the same line, with one product instead of two
        yield block.base.add_(mean * ratios if ratio is None else mean.mul_(ratios))


def _stock_ratio(g: Tensor) -> float:
    """Equation 7's t from a Gram matrix (n, n); 0, the base itself, for an empty tensor."""
    n = len(g)
    if not n:
        return 0.0
    norms = g.diagonal().sqrt()
    cosines = g / torch.outer(norms, norms).clamp_min(1e-12)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    return n * cosine / (1 + (n - 1) * cosine)


def _row_ratios(deltas: Sequence[Tensor]) -> Tensor:
    """n tensors (rows, columns) -> (rows, 1): equation 7's t of every output row."""
    stack = torch.stack(list(deltas)).double()
    g = torch.einsum("irc,jrc->rij", stack, stack)
    return torch.tensor([[_stock_ratio(row)] for row in g], dtype=torch.float32, device=deltas[0].device)
