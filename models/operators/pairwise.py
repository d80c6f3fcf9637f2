"""Merges of one pair: NuSLERP on tensors, rows or columns, NearSwap, Arcee Fusion. mergekit 0.1.5 gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, prod

import torch
from torch import Tensor

from models.operators.blocks import Block, MemoryBlocks
from models.operators.dense import gram, task_vectors
from models.operators.parameters import NearSwap, NoParameters, NuSlerp
from models.operators.selection import find_cuts, magnitude_of
from models.operators.spans import BLOCK

#: mergekit's floors: of a norm that is divided by (NuSLERP), of a difference (NearSwap), of a probability (Arcee Fusion).
NORM_FLOOR, DIFFERENCE_FLOOR, PROBABILITY_FLOOR = 1e-7, 1e-6, 1e-8
_QUARTERS = (0.25, 0.5, 0.75)


def arc(first: Tensor, second: Tensor, dot: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Coefficients of SLERP on raw vectors: sin((1-t) a)/sin(a) and sin(t a)/sin(a); fp64 in, fp32 out.

    Args:
        first, second: squared norms.
        dot: inner products.
    """
    lengths = first.sqrt().clamp_min(NORM_FLOOR) * second.sqrt().clamp_min(NORM_FLOOR)
    cosine = (dot / lengths).clamp(-1, 1)
    # parallel is what an fp32 cosine cannot tell from 1: there, and for opposite vectors, the line is all there is
    parallel = 1 - cosine.float().square() <= 1e-16
    angle = cosine.masked_fill(parallel, 0).acos()
    shares = ((1 - t, (1 - t) * angle), (t, t * angle))
    one, two = (torch.where(parallel, share, part.sin() / angle.sin()).float() for share, part in shares)
    return one, two


def nuslerp(blocks: MemoryBlocks, parameters: NuSlerp) -> Iterator[Tensor]:
    """SLERP of two inputs, or of their task vectors when there is a base; t is the second's share of the weights.

    One angle per tensor (``nuslerp_flatten``), per vector along the first axis (``nuslerp_row_wise``: the columns of a
    matrix, whatever the name says), or per vector along the last axis (neither: its rows).
    """
    one, two = parameters.weight
    total = one + two
    t = 0.5 if abs(total) < 1e-6 else two / total
    coefficients = None
    if parameters.nuslerp_flatten:
        g = gram(_pair(block) for block in blocks)
        coefficients = arc(g[0, 0], g[1, 1], g[0, 1], t) if len(g) else None
    elif parameters.nuslerp_row_wise:
        first, second, dot = _along_first_axis(blocks)
        coefficients = arc(first, second, dot, t)
    for block in blocks:
        v0, v1 = _pair(block)
        if coefficients is None:
            a, b = v0.double(), v1.double()
            first, second, dot = ((x * y).sum(-1, keepdim=True) for x, y in ((a, a), (b, b), (a, b)))
            c0, c1 = arc(first, second, dot, t)
        elif parameters.nuslerp_flatten:
            c0, c1 = coefficients
        else:
            places = _columns(block, len(coefficients[0]))
            c0, c1 = (c.to(v0.device)[places].view_as(v0) for c in coefficients)
        merged = v0.mul_(c0).add_(v1.mul_(c1))
        yield merged if block.base is None else block.base.add_(merged)


def _pair(block: Block) -> list[Tensor]:
    return block.experts if block.base is None else task_vectors(block)


def _columns(block: Block, width: int) -> Tensor:
    """Which vector along the first axis every entry of a block belongs to, (entries,) int64."""
    like = block.experts[0]
    return torch.arange(block.first, block.first + like.numel(), device=like.device).remainder_(width)


def _along_first_axis(blocks: MemoryBlocks) -> list[Tensor]:
    """(width,) fp64 each: squared norms of both, inner products of all vectors along the first axis."""
    shape = tuple(blocks.shape)
    width = max(prod(shape[1:]), 1)
    sums = [torch.zeros(width, dtype=torch.float64) for _ in range(3)]
    for block in blocks:
        v0, v1 = (v.reshape(-1).double() for v in _pair(block))
        places = _columns(block, width)
        # a product at a time: together they would be as much memory as all inputs
        for total, (one, two) in zip(sums, ((v0, v0), (v1, v1), (v0, v1)), strict=True):
            total.index_add_(0, places.cpu(), (one * two).cpu())
    return sums


def nearswap(blocks: MemoryBlocks, parameters: NearSwap) -> Iterator[Tensor]:
    """The base moved towards the input by s = t / |difference|, cut to 0..1: entries closer than t are swapped whole.

    (alchemonaut, QuartetAnemoi-70B, 2024: no paper.)
    """
    for block in blocks:
        (delta,) = task_vectors(block)
        share = (parameters.t / delta.abs().clamp_min_(DIFFERENCE_FLOOR)).clamp_(0, 1)
        yield block.required_base.add_(delta.mul_(share))


def importance(base: Tensor, other: Tensor) -> Tensor:
    """(rows, columns) fp32 twice -> the same: |difference| x KL(softmax of the other's row || softmax of the base's)."""
    # fp64: of a fine-tuned row the divergence is near 1e-7, where an fp32 sum is rounding
    p, q = (torch.softmax(x.double(), -1).add_(PROBABILITY_FLOOR) for x in (other, base))
    divergence = q.div_(p).log_().mul_(p).sum(-1, keepdim=True).neg_().clamp_min_(0)
    return (other - base).abs_().mul_(divergence.float())


def arcee_fusion(blocks: MemoryBlocks, parameters: NoParameters) -> Iterator[Tensor]:
    """The input where its ``importance`` is at least median + 1.5 (third - first quartile) of the tensor, else the base.

    (Arcee AI, mergekit's ``arcee_fusion``: no paper.) Quartiles are exact; mergekit samples beyond 1,000,000 entries.
    """
    limit = _limit(blocks)
    for block in blocks:
        keep = importance(block.base, block.experts[0]) >= limit
        (delta,) = task_vectors(block)
        yield block.required_base.add_(delta.mul_(keep))


def _limit(blocks: MemoryBlocks) -> float:
    size = prod(blocks.shape)
    if not size:
        return 0.0
    # places in ascending order, counted down as mergekit counts them
    places = [floor(share * (size - 1)) for share in _QUARTERS]
    if size <= BLOCK:
        scores = torch.cat([importance(b.base, b.experts[0]).reshape(-1) for b in blocks]).sort().values
        q1, median, q3 = (scores[place] for place in places)
    else:
        (cuts,) = find_cuts(lambda: ((importance(b.base, b.experts[0]),) for b in blocks),
                            [[size - place for place in places]], size)
        q1, median, q3 = (torch.tensor(magnitude_of(cut.threshold)) for cut in cuts)
    # in fp32, step by step, as the scores are: the limit may be equal to one of them
    return float(median + 1.5 * (q3 - q1))
