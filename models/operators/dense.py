"""Merges without sparsity. Those on the sphere need only the inputs' Gram matrix: one walk to measure, one to combine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.operators.blocks import Block, MemoryBlocks, Undefined
from models.operators.drop import drop_, kept_below
from models.operators.parameters import (
    Interpolation,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    Passthrough,
    Resta,
    Slerp,
    TaskArithmetic,
)

#: Above this cosine, inputs count as parallel and SLERP is a straight line (its sines would lose their digits).
PARALLEL = 0.9995
#: A sum of unit vectors shorter than this is rounding.
CANCELLED = 1e-9


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


def passthrough(blocks: MemoryBlocks, parameters: Passthrough) -> Iterator[Tensor]:
    """The input as it is, or times ``scale``."""
    (scale,) = parameters.scale
    for block in blocks:
        yield block.experts[0] if scale == 1 else block.experts[0].mul_(scale)


def task_vectors(block: Block) -> list[Tensor]:
    """theta_i - theta_base, in place of the experts."""
    return [expert.sub_(block.base) for expert in block.experts]


def task_arithmetic(blocks: MemoryBlocks, parameters: TaskArithmetic) -> Iterator[Tensor]:
    """theta_base + lambda sum_i w_i (theta_i - theta_base) (Ilharco et al. 2023, equation 1)."""
    scale = parameters.lambda_ / divisor(parameters.weight, parameters.normalize)
    for block in blocks:
        yield block.required_base.add_(weighted_sum(task_vectors(block), parameters.weight), alpha=scale)


def wise_ft(blocks: MemoryBlocks, parameters: Interpolation) -> Iterator[Tensor]:
    """(1 - alpha) theta_base + alpha theta (Wortsman et al. 2022, equation 1)."""
    for block in blocks:
        yield block.required_base.lerp_(block.experts[0], parameters.alpha)


def resta(blocks: MemoryBlocks, parameters: Resta) -> Iterator[Tensor]:
    """theta_task + gamma (theta_aligned - theta_unaligned); base: the aligned model, inputs: task, unaligned.

    With a density below 1 the task vector theta_task - theta_aligned passes DARE first (Bhardwaj et al. 2024).
    """
    for block in blocks:
        task, unaligned = task_vectors(block)
        if parameters.density < 1:
            drop_(task, kept_below(blocks.uniform(0, block), parameters.density), parameters.density)
        yield block.required_base.add_(task).add_(unaligned, alpha=-parameters.gamma)


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
        Undefined: the weighted sum is 0 (opposite inputs), so that no mean direction exists.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    # the start is the normalised chordal mean, which is within a few degrees of the Karcher mean already
    c = w.clone()
    norm = float(c @ g @ c) ** 0.5
    if norm < CANCELLED:
        raise Undefined("the weighted directions cancel, and there is no Karcher mean; change the weights")
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


def karcher(blocks: MemoryBlocks, parameters: Karcher) -> Iterator[Tensor]:
    """n-way SLERP: the weighted Karcher mean of the directions, with the weighted mean of the norms.

    Inputs whose norm is not above ``tol`` have no direction and count in the mean of the norms alone, as in mergekit.
    """
    g = gram(block.experts for block in blocks)
    weights = torch.tensor(parameters.weight, dtype=torch.float64)
    coefficients = weights = weights / weights.sum()
    norms = g.diagonal().sqrt()
    there = norms > parameters.tol
    if len(g) and bool(there.any()):
        unit = g[there][:, there] / torch.outer(norms[there], norms[there])
        mean = karcher_coefficients(unit, weights[there].tolist(), parameters.max_iter, parameters.tol)
        coefficients = torch.zeros_like(weights)
        coefficients[there] = mean * (weights @ norms) / norms[there]
    for block in blocks:
        yield weighted_sum(block.experts, coefficients.tolist())


def multislerp(blocks: MemoryBlocks, parameters: MultiSlerp) -> Iterator[Tensor]:
    """The normalised weighted mean of the directions (of task vectors, when there is a base), with the mean norm.

    mergekit writes it as a step in the tangent space at that mean, which is 0 there: the mean is what is left.
    """
    directions = (task_vectors(b) if b.base is not None else b.experts for b in blocks)
    coefficients = _mean_direction(gram(directions), parameters)
    for block in blocks:
        if block.base is None:
            yield weighted_sum(block.experts, coefficients)
        else:
            yield block.base.add_(weighted_sum(task_vectors(block), coefficients))


def _mean_direction(g: Tensor, parameters: MultiSlerp) -> list[float]:
    """Coefficients on the raw inputs, (n,).

    Raises:
        Undefined: more than two directions cancel, so that there is no mean one; of two, the plain sum is taken.
    """
    total = divisor(parameters.weight, parameters.normalize_weights)
    weights = torch.tensor([w / total for w in parameters.weight], dtype=torch.float64)
    norms = g.diagonal().sqrt()
    if not len(g) or not bool(norms.any()):
        return weights.tolist()
    if len(g) == 1:
        return [1.0]
    # a zero input has no direction; eps leaves it out and changes nothing else
    shares = weights / (norms + parameters.eps)
    length = max(float(shares @ g @ shares), 0.0) ** 0.5
    if length >= max(parameters.eps, CANCELLED):
        return (shares / length * float(weights @ norms)).tolist()
    if len(g) == 2:
        return weights.tolist()
    raise Undefined("the weighted directions cancel, and multislerp needs their mean; change the weights")


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
        yield block.required_base.add_(mean * ratios if ratio is None else mean.mul_(ratios))


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
