"""Merges of sparse task vectors: select (trim, drop, rank-sample, cut outliers) x combine (weighted sum, elect signs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from models.operators.blocks import Block, MemoryBlocks
from models.operators.dense import divisor, task_vectors, weighted_sum
from models.operators.drop import drop_, keep_probabilities, kept_below
from models.operators.election import elect_, elect_unweighted
from models.operators.parameters import Breadcrumbs, Dare, Della, DellaTies, Sce, Ties
from models.operators.selection import MagnitudeCut, count, find_cuts

#: An L1 norm below this is none.
NO_NORM = 1e-7
#: Zeroes what is not selected of one input's block, in place.
Select = Callable[[int, Tensor, Block], None]
#: (deltas, weights, normalize) -> one tensor; may overwrite the deltas.
Combine = Callable[[Sequence[Tensor], Sequence[float], bool], Tensor]


def _merge(blocks: MemoryBlocks, parameters: Ties | Dare | Breadcrumbs, select: Select, combine: Combine,
           ) -> Iterator[Tensor]:
    """theta_base + lambda combine(select(theta_i - theta_base))."""
    for block in blocks:
        deltas = task_vectors(block)
        for i, delta in enumerate(deltas):
            select(i, delta, block)
        yield block.required_base.add_(combine(deltas, parameters.weight, parameters.normalize), alpha=parameters.lambda_)


def add_up(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i delta_i, divided by sum_i w_i when normalised."""
    scale = divisor(weights, normalize)
    return weighted_sum(deltas, [w / scale for w in weights])


def largest_cuts(blocks: MemoryBlocks, density: Sequence[float]) -> list[MagnitudeCut]:
    """Per input, where its density x size largest entries end."""
    size = prod(blocks.shape)
    return [c for (c,) in find_cuts(lambda: (task_vectors(b) for b in blocks),
                                    [[count(share, size)] for share in density], size)]


def largest(blocks: MemoryBlocks, density: Sequence[float], cuts: list[MagnitudeCut] | None = None) -> Select:
    """TIES' trim: exactly k = density x size entries of largest magnitude; ties go to the lowest flat index.

    Args:
        density: per input.
        cuts: where the k largest were sought over more than this tensor.
    """
    # a plan may hand the same cuts to more than one run, and masks use them up
    cuts = [cut.fresh() for cut in (largest_cuts(blocks, density) if cuts is None else cuts)]

    def select(i: int, delta: Tensor, block: Block) -> None:
        if density[i] < 1:
            delta.copy_(cuts[i].keep(delta))

    return select


def outlier_cuts(blocks: MemoryBlocks, parameters: Breadcrumbs) -> list[list[MagnitudeCut]]:
    """Per input, where its gamma largest entries end, and where the next density x size do."""
    # two cuts of one ranking: the top that goes, and the top together with what stays below it
    size = prod(blocks.shape)
    kept = [count(share, size) for share in parameters.density]
    tops = [min(int(share * size + 1e-6), size - k) for share, k in zip(parameters.gamma, kept, strict=True)]
    return find_cuts(lambda: (task_vectors(b) for b in blocks),
                     [[top, top + k] for top, k in zip(tops, kept, strict=True)], size)


def outliers(pairs: Sequence[Sequence[MagnitudeCut]]) -> Select:
    """Breadcrumbs: drop the gamma largest, then keep the next density x size (Davari & Belilovsky 2024).

    With no outliers asked for, the largest stay; where both shares exceed the whole, the outliers give way.
    """
    pairs = [[cut.fresh() for cut in pair] for pair in pairs]

    def select(i: int, delta: Tensor, block: Block) -> None:
        dropped, reached = (cut.mask(delta) for cut in pairs[i])
        delta.mul_(reached & ~dropped)

    return select


def random_drop(blocks: MemoryBlocks, parameters: Dare) -> Select:
    """DARE: keep each entry with probability density, divide by it."""

    def select(i: int, delta: Tensor, block: Block) -> None:
        if parameters.density[i] < 1:
            drop_(delta, kept_below(blocks.uniform(i, block), parameters.density[i]), parameters.density[i],
                  parameters.rescale)

    return select


def rank_drop(blocks: MemoryBlocks, parameters: Della) -> Select:
    """DELLA's MagPrune: keep probabilities rise with the rank in the row (``drop.keep_probabilities``).

    What is kept is divided by its own probability, which keeps its expected value (Deep et al. 2024, section 3.1).
    """

    def select(i: int, delta: Tensor, block: Block) -> None:
        if parameters.density[i] >= 1:
            return
        keep = keep_probabilities(delta.cpu().numpy(), parameters.density[i], parameters.epsilon[i]).to(delta.device)
        # drop_ with a density per entry
        delta.mul_(blocks.uniform(i, block) < keep)
        if parameters.rescale:
            # epsilon = density keeps the smallest entry with probability 0, and 0 / 0 would spread NaN over the merge
            delta.div_(keep.masked_fill_(keep == 0, 1))

    return select


def at_full_norm(blocks: MemoryBlocks, make: Callable[[], Select], rescale: bool) -> Select:
    """What ``make`` selects, scaled to the L1 norm that the input's task vector had: mergekit's ``rescale``.

    Args:
        make: gives a selection that starts at the tensor's first element.
        rescale: False: the selection as it is, and no walk.
    """
    if not rescale:
        return make()
    select = make()
    norms: dict[int, tuple[float, float]] = {}
    for block in blocks:
        for i, delta in enumerate(task_vectors(block)):
            whole = float(delta.abs().sum(dtype=torch.float64))
            select(i, delta, block)
            before, after = norms.get(i, (0.0, 0.0))
            norms[i] = before + whole, after + float(delta.abs().sum(dtype=torch.float64))
    # nothing kept, or nothing there: no factor brings a norm back
    factors = {i: before / after if min(before, after) >= NO_NORM else 1.0 for i, (before, after) in norms.items()}
    again = make()

    def scaled(i: int, delta: Tensor, block: Block) -> None:
        again(i, delta, block)
        delta.mul_(factors[i])

    return scaled


def ties(blocks: MemoryBlocks, parameters: Ties, cuts: list[MagnitudeCut] | None = None) -> Iterator[Tensor]:
    """Trim, elect sign, disjoint merge (Yadav et al. 2023); ``cuts`` when the k largest were sought over the model."""
    cuts = largest_cuts(blocks, parameters.density) if cuts is None else cuts
    select = at_full_norm(blocks, lambda: largest(blocks, parameters.density, cuts), parameters.rescale)
    return _merge(blocks, parameters, select, elect_)


def dare_linear(blocks: MemoryBlocks, parameters: Dare) -> Iterator[Tensor]:
    """Drop and rescale, then the weighted sum (Yu et al. 2024)."""
    return _merge(blocks, parameters, random_drop(blocks, parameters), add_up)


def dare_ties(blocks: MemoryBlocks, parameters: Dare) -> Iterator[Tensor]:
    """Drop and rescale, then TIES' sign election."""
    return _merge(blocks, parameters, random_drop(blocks, parameters), elect_)


def della_linear(blocks: MemoryBlocks, parameters: Della) -> Iterator[Tensor]:
    """MagPrune, then the weighted sum."""
    return _merge(blocks, parameters, rank_drop(blocks, parameters), add_up)


def della(blocks: MemoryBlocks, parameters: DellaTies) -> Iterator[Tensor]:
    """MagPrune, then TIES' sign election (Deep et al. 2024)."""
    return _merge(blocks, parameters, rank_drop(blocks, parameters), elect_)


def breadcrumbs(blocks: MemoryBlocks, parameters: Breadcrumbs) -> Iterator[Tensor]:
    """Mask outliers and small entries, then the weighted sum."""
    return _merge(blocks, parameters, _crumbs(blocks, parameters), add_up)


def breadcrumbs_ties(blocks: MemoryBlocks, parameters: Breadcrumbs) -> Iterator[Tensor]:
    """Mask outliers and small entries, then TIES' sign election."""
    return _merge(blocks, parameters, _crumbs(blocks, parameters), elect_)


def _crumbs(blocks: MemoryBlocks, parameters: Breadcrumbs) -> Select:
    pairs = outlier_cuts(blocks, parameters)
    return at_full_norm(blocks, lambda: outliers(pairs), parameters.rescale)


def sce(blocks: MemoryBlocks, parameters: Sce) -> Iterator[Tensor]:
    """Select, calculate, erase (Wan et al. 2024): the entries of highest variance over inputs, weighted by energy.

    k = select_topk x (entries of non-zero variance); weights w_i = sum of squares of the selected delta_i, normalised;
    entries against the elected sign are erased and the rest averaged by weight.
    """
    cut = _variance_cut(blocks, parameters.select_topk) if parameters.select_topk < 1 else None
    energy: list[float] = []
    for _, deltas in _selected(blocks, cut):
        squares = [float(delta.view(-1) @ delta.view(-1)) for delta in deltas]
        energy = [before + here for before, here in zip(energy or [0.0] * len(squares), squares, strict=True)]
    total = sum(energy)
    # equal models, and empty tensors, have no energy: a plain mean
    weights = [e / total for e in energy] if total else [1 / max(len(energy), 1)] * len(energy)
    for block, deltas in _selected(blocks, cut):
        yield block.required_base.add_(elect_unweighted(deltas, weights), alpha=parameters.lambda_)


def _variance_cut(blocks: MemoryBlocks, share: float) -> MagnitudeCut:
    """The entries of highest variance over inputs: a share of those whose variance is not 0."""
    varying = sum(int(_variance(task_vectors(block)).count_nonzero()) for block in blocks)
    ((cut,),) = find_cuts(lambda: ((_variance(task_vectors(block)),) for block in blocks),
                          [[int(share * varying + 1e-6)]], prod(blocks.shape))
    return cut


def _selected(blocks: MemoryBlocks, cut: MagnitudeCut | None) -> Iterator[tuple[Block, list[Tensor]]]:
    """A walk's blocks with their task vectors, 0 outside the cut."""
    fresh = cut.fresh() if cut else None
    for block in blocks:
        deltas = task_vectors(block)
        if fresh:
            mask = fresh.mask(_variance(deltas))
            deltas = [delta.mul_(mask) for delta in deltas]
        yield block, deltas


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance over inputs, entry by entry."""
    return torch.stack(list(deltas)).var(0, unbiased=False)
