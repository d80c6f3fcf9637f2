"""Exact selection by magnitude over tensors that are only seen in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HIGH, _LOW = 1 << 15, 1 << 16
_ALL = -1

Walk = Callable[[], Iterable[Sequence[Tensor]]]


@dataclass
class Cut:
    """The k largest values of a tensor: those above a threshold, and the first ``ties`` of those equal to it.

    Args:
        threshold: bit pattern of the k-th largest magnitude as fp32 (for non-negative floats, order of bits is order of
            value); -1 keeps everything, the largest int32 keeps nothing.
        ties: how many values equal to the threshold are kept: those of lowest flat index.
    """

    threshold: int
    ties: int

    def fresh(self) -> Cut:
        """A copy that starts at the tensor's first element: masks consume ``ties`` as they go."""
        return replace(self)

    def mask(self, bits: Tensor) -> Tensor:
        """Which of a block's values are kept; blocks must come in order of their flat index."""
        if self.threshold == _ALL:
            return torch.ones_like(bits, dtype=torch.bool)
        keep = bits > self.threshold
        if self.ties:
            equal = bits == self.threshold
            found = int(equal.sum())
            if found > self.ties:
                places = equal.view(-1).nonzero().squeeze(1)
                equal.view(-1)[places[self.ties:]] = False
            self.ties -= min(found, self.ties)
            keep |= equal
        return keep


NOTHING = Cut(torch.iinfo(torch.int32).max, 0)
EVERYTHING = Cut(_ALL, 0)


def count(share: float, size: int) -> int:
    """How many of ``size`` a share is: rounded down, but never to nothing for a share above 0."""
    # the small term undoes the last bit of products such as 0.29 * 100
    return min(size, max(math.floor(share * size + 1e-6), 1 if share > 0 and size else 0))


def magnitude_bits(values: Tensor) -> Tensor:
    """fp32 values -> int32 bit patterns of their magnitudes, which order as the magnitudes do."""
    return values.view(torch.int32).bitwise_and(0x7FFFFFFF)


def high_histogram(bits: Tensor) -> Tensor:
    """Counts of the upper 15 bits, (2**15,) int64."""
    return torch.bincount((bits.view(-1) >> 16), minlength=_HIGH)


def low_histogram(bits: Tensor, high: int) -> Tensor:
    """Counts of the lower 16 bits of the values whose upper bits are ``high``, (2**16,) int64."""
    bits = bits.view(-1)
    return torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=_LOW)


def descend(histogram: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest value, how many of that bin are among the k largest)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def find_cuts(walk: Walk, sizes: Sequence[Sequence[int]], total: int) -> list[list[Cut]]:
    """The exact k-th largest magnitudes, for several tensors and several k each, in two walks and no sorting.

    Args:
        walk: starts a walk; every step gives one block of bit patterns per tensor.
        sizes: per tensor, the k wanted.
        total: elements per tensor.

    Returns:
        A Cut for each k: radix selection, first on the upper 15 bits, then on the lower 16 within the bin found.
    """
    wanted = [(i, j, k) for i, ks in enumerate(sizes) for j, k in enumerate(ks) if 0 < k < total]
    cuts = [[EVERYTHING if k >= total else NOTHING for k in ks] for ks in sizes]
    if not wanted:
        return cuts
    high = {i: torch.zeros(_HIGH, dtype=torch.int64) for i, _, _ in wanted}
    for blocks in walk():
        for i, histogram in high.items():
            histogram += high_histogram(blocks[i]).cpu()
    bins = {(i, j): descend(high[i], k) for i, j, k in wanted}
    low = {(i, b): torch.zeros(_LOW, dtype=torch.int64) for (i, _), (b, _) in bins.items()}
    for blocks in walk():
        for (i, b), histogram in low.items():
            histogram += low_histogram(blocks[i], b).cpu()
    for (i, j), (b, rest) in bins.items():
        value, ties = descend(low[i, b], rest)
        cuts[i][j] = Cut(b << 16 | value, ties)
    return cuts


def walk_once(blocks: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Blocks of values -> blocks of bit patterns."""
    for values in blocks:
        yield [magnitude_bits(v) for v in values]
