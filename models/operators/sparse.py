"""Merges of sparse task vectors: select (trim, drop, rank-sample, cut outliers) x combine (weighted sum, elect signs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from models.operators import parameters
from models.operators.blocks import Block, MemoryBlocks
from models.operators.dense import divisor, drop, task_vectors, weighted_sum
from models.operators.selection import Cut, count, find_cuts

#: Zeroes what is not selected of one input's block, in place.
Select = Callable[[int, Tensor, Block], None]


def _merge(blocks: MemoryBlocks, p: parameters.Dare, select: Select, combine: Callable) -> Iterator[Tensor]:
    """theta_base + lambda combine(select(theta_i - theta_base))."""
    for block in blocks:
        deltas = task_vectors(block)
        for i, delta in enumerate(deltas):
            select(i, delta, block)
        yield block.base.add_(combine(deltas, p.weight, p.normalize), alpha=p.lambda_)


def plain(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i delta_i, divided by sum_i w_i when normalised."""
    scale = divisor(weights, normalize)
    return weighted_sum(deltas, [w / scale for w in weights])


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """TIES' elect and disjoint merge: keep, entry by entry, what agrees with the sign of sum_i w_i delta_i.

    A sum of exactly 0 counts as positive. Normalised: divided by |w_i| of the entries that agree and are not 0.
    """
    parts = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    # float arithmetic throughout: masks of another type would double the traffic
    sign = total.sign_().add_(0.5).sign_()
    kept = torch.zeros_like(sign)
    shares = torch.zeros_like(sign) if normalize else None
    for part, weight in zip(parts, weights, strict=True):
        agreeing = part.mul_(sign).clamp_min_(0)
        kept.add_(agreeing)
        if shares is not None:
            # |w|: by a negative weight alone on an entry, its sign would come back
            shares.add_(agreeing.sign_(), alpha=abs(weight))
    if shares is not None:
        # where nothing agrees, 0 / 0 becomes 0 / 1
        kept.div_(shares.add_(shares == 0))
    return kept.mul_(sign)


def trim(blocks: MemoryBlocks, shares: Sequence[float], cuts: list[Cut] | None = None) -> Select:
    """TIES' trim: exactly k = share x size entries of largest magnitude; ties go to the lowest flat index."""
    if cuts is None:
        size = prod(blocks.shape)
        cuts = [c for (c,) in find_cuts(lambda: (task_vectors(b) for b in blocks),
                                        [[count(share, size)] for share in shares], size)]
    cuts = [cut.fresh() for cut in cuts]

    def select(i: int, delta: Tensor, block: Block) -> None:
        if shares[i] < 1:
            delta.copy_(cuts[i].keep(delta))

    return select


def outliers(blocks: MemoryBlocks, p: parameters.Breadcrumbs) -> Select:
    """Breadcrumbs: drop the gamma largest, then keep the next density x size (Davari & Belilovsky 2024).

    With no outliers asked for, the largest stay; where both shares exceed the whole, the outliers give way.
    """
    size = prod(blocks.shape)
    kept = [count(share, size) for share in p.density]
    tops = [min(int(share * size + 1e-6), size - k) for share, k in zip(p.gamma, kept, strict=True)]
    pairs = find_cuts(lambda: (task_vectors(b) for b in blocks),
                      [[top, top + k] for top, k in zip(tops, kept, strict=True)], size)
    pairs = [[cut.fresh() for cut in pair] for pair in pairs]

    def select(i: int, delta: Tensor, block: Block) -> None:
        largest, enough = (cut.mask(delta) for cut in pairs[i])
        delta.mul_(enough & ~largest)

    return select


def random_drop(blocks: MemoryBlocks, p: parameters.Dare) -> Select:
    """DARE: keep each entry with probability density, divide by it."""

    def select(i: int, delta: Tensor, block: Block) -> None:
        if p.density[i] < 1:
            drop(delta, blocks.uniform(i, block), p.density[i], p.rescale)

    return select


def rank_drop(blocks: MemoryBlocks, p: parameters.Della) -> Select:
    """DELLA's MagPrune: keep probabilities rise with the rank in the row, from density - epsilon to density + epsilon.

    What is kept is divided by its own probability (Deep et al. 2024, section 3.1). Of equal magnitudes, the lower index
    ranks higher.
    """

    def select(i: int, delta: Tensor, block: Block) -> None:
        if p.density[i] >= 1:
            return
        keep = keep_probabilities(delta.cpu().numpy(), p.density[i], p.epsilon[i]).to(delta.device)
        delta.mul_(blocks.uniform(i, block) < keep)
        if p.rescale and p.density[i] > 0:
            delta.div_(keep)

    return select


def keep_probabilities(values: np.ndarray, density: float, epsilon: float) -> Tensor:
    """DELLA's probability for every entry of (rows, columns) fp32, by its rank in the row."""
    columns = values.shape[-1]
    if not density or columns < 2:
        return torch.full(values.shape, density)
    # magnitude in the upper half and place in the lower makes one integer to sort, exact in its ties
    keys = (values.view(np.int32) & 0x7FFFFFFF).astype(np.int64)
    keys <<= 32
    keys |= np.arange(columns - 1, -1, -1)
    keys.sort(axis=-1)
    places = columns - 1 - torch.from_numpy(keys).bitwise_and_(0xFFFFFFFF)
    ramp = torch.linspace(density - epsilon, density + epsilon, columns)
    rows = places.view(-1, columns)
    return torch.empty(rows.shape).scatter_(1, rows, ramp.expand(rows.shape)).view(values.shape)


def ties(blocks: MemoryBlocks, p: parameters.Ties, cuts: list[Cut] | None = None) -> Iterator[Tensor]:
    """Trim, elect sign, disjoint merge (Yadav et al. 2023); ``cuts`` when the k largest were sought over the model."""
    return _merge(blocks, p, trim(blocks, p.density, cuts), elect)


def dare_linear(blocks: MemoryBlocks, p: parameters.Dare) -> Iterator[Tensor]:
    """Drop and rescale, then the weighted sum (Yu et al. 2024)."""
    return _merge(blocks, p, random_drop(blocks, p), plain)


def dare_ties(blocks: MemoryBlocks, p: parameters.Dare) -> Iterator[Tensor]:
    """Drop and rescale, then TIES' sign election."""
    return _merge(blocks, p, random_drop(blocks, p), elect)


def della_linear(blocks: MemoryBlocks, p: parameters.Della) -> Iterator[Tensor]:
    """MagPrune, then the weighted sum."""
    return _merge(blocks, p, rank_drop(blocks, p), plain)


def della(blocks: MemoryBlocks, p: parameters.DellaTies) -> Iterator[Tensor]:
    """MagPrune, then TIES' sign election (Deep et al. 2024)."""
    return _merge(blocks, p, rank_drop(blocks, p), elect)


def breadcrumbs(blocks: MemoryBlocks, p: parameters.Breadcrumbs) -> Iterator[Tensor]:
    """Mask outliers and small entries, then the weighted sum."""
    return _merge(blocks, p, outliers(blocks, p), plain)


def breadcrumbs_ties(blocks: MemoryBlocks, p: parameters.Breadcrumbs) -> Iterator[Tensor]:
    """Mask outliers and small entries, then TIES' sign election."""
    return _merge(blocks, p, outliers(blocks, p), elect)


def sce(blocks: MemoryBlocks, p: parameters.Sce) -> Iterator[Tensor]:
    """Select, calculate, erase (Wan et al. 2024): the entries of highest variance over inputs, weighted by energy.

    k = select_topk x (entries of non-zero variance); weights w_i = sum of squares of the selected delta_i, normalised;
    entries against the elected sign are erased and the rest averaged by weight.
    """
    size = prod(blocks.shape)
    cut = None
    if p.select_topk < 1:
        varying = sum(int(_variance(task_vectors(block)).count_nonzero()) for block in blocks)
        ((cut,),) = find_cuts(lambda: ((_variance(task_vectors(b)),) for b in blocks),
                              [[int(p.select_topk * varying + 1e-6)]], size)

    def selected() -> Iterator[tuple[Block, list[Tensor]]]:
        fresh = cut.fresh() if cut else None
        for block in blocks:
            deltas = task_vectors(block)
            if fresh:
                mask = fresh.mask(_variance(deltas))
                deltas = [delta.mul_(mask) for delta in deltas]
            yield block, deltas

    energy: list[float] = []
    for _, deltas in selected():
        squares = [float(delta.view(-1) @ delta.view(-1)) for delta in deltas]
        energy = [a + b for a, b in zip(energy or [0.0] * len(squares), squares, strict=True)]
    total = sum(energy)
    weights = [e / total for e in energy] if total else [1 / max(len(energy), 1)] * len(energy)
    for block, deltas in selected():
        # signs are elected by the unweighted sum here, unlike in TIES
        negative = torch.stack(deltas).sum(0) < 0
        agree = [torch.where(negative, d < 0, d > 0) for d in deltas]
        mixed = sum(d * a * w for d, a, w in zip(deltas, agree, weights, strict=True))
        shares = sum(a * w for a, w in zip(agree, weights, strict=True))
        yield block.base.add_(mixed / shares.masked_fill(shares == 0, 1), alpha=p.lambda_)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance over inputs, entry by entry."""
    return torch.stack(list(deltas)).var(0, unbiased=False)
