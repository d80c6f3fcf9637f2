"""Exact selection by magnitude over tensors that are only seen in blocks."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
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
        all_ties: that these are all there are.
    """

    threshold: int
    ties: int
    all_ties: bool = False

    def fresh(self) -> Cut:
        """A copy that starts at the tensor's first element: masks consume ``ties`` as they go."""
        return replace(self)

    def keep(self, values: Tensor) -> Tensor:
        """A block's values, 0 where they are not kept; blocks must come in order of their flat index."""
        if self.threshold == _ALL:
            return values
        if self.threshold == NOTHING.threshold:
            return values.zero_()
        if self.all_ties:
            return torch.hardshrink(values, _value(self.threshold - 1))
        if not self.ties:
            # from the block on where the ties are used up, all that equals the threshold goes
            return torch.hardshrink(values, _value(self.threshold))
        return values.mul_(self.mask(values))

    def mask(self, values: Tensor) -> Tensor:
        """Which of a block's values are kept; as ``keep``."""
        bits = magnitude_bits(values)
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


def _value(bits: int) -> float:
    """The magnitude with this bit pattern; -1, the neighbour below 0: any negative number."""
    return -1.0 if bits < 0 else struct.unpack("<f", struct.pack("<i", bits))[0]


def magnitude_bits(values: Tensor) -> Tensor:
    """fp32 values -> int32 bit patterns of their magnitudes, which order as the magnitudes do."""
    return values.view(torch.int32).bitwise_and(0x7FFFFFFF)


def high_histogram(values: Tensor) -> Tensor:
    """Counts of the upper 15 bits of fp32 values' magnitudes, (2**15,) int64."""
    # of every four bytes the upper two, little-endian: half the traffic of shifting whole words
    upper = values.reshape(-1).view(torch.int16)[1::2].bitwise_and(0x7FFF)
    return torch.bincount(upper, minlength=_HIGH)


class LowHistogram:
    """Counts of the lower 16 bits of the values whose upper bits are ``high``, gathered over blocks.

    Those values are few: they wait in a buffer and are counted when there are enough of them to pay for a table of 2**16.
    """

    def __init__(self, high: int) -> None:
        self.high, self.size = high, 0
        # one buffer: thousands of small tensors kept alive would pin the heap between the large ones that come and go
        self.waiting = torch.empty(_LOW, dtype=torch.int32)
        self.counts = torch.zeros(_LOW, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        bits = magnitude_bits(values.reshape(-1))
        inside = bits[(bits >> 16) == self.high].bitwise_and_(0xFFFF).cpu()
        if self.size + len(inside) > len(self.waiting):
            self.total()
        if len(inside) > len(self.waiting):
            self.counts += torch.bincount(inside, minlength=_LOW)
            return
        self.waiting[self.size:self.size + len(inside)] = inside
        self.size += len(inside)

    def total(self) -> Tensor:
        self.counts += torch.bincount(self.waiting[:self.size], minlength=_LOW)
        self.size = 0
        return self.counts


def descend(histogram: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest value, how many of that bin are among the k largest)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def find_cuts(walk: Walk, sizes: Sequence[Sequence[int]], total: int) -> list[list[Cut]]:
    """The exact k-th largest magnitudes, for several tensors and several k each, in two walks and no sorting.

    Args:
        walk: starts a walk; every step gives one block of fp32 values per tensor.
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
    low = {(i, b): LowHistogram(b) for (i, _), (b, _) in bins.items()}
    for blocks in walk():
        for (i, _), histogram in low.items():
            histogram.add(blocks[i])
    for (i, j), (b, rest) in bins.items():
        cuts[i][j] = cut_at(b, low[i, b].total(), rest)
    return cuts


def cut_at(high: int, low: Tensor, rest: int) -> Cut:
    """The cut that keeps ``rest`` of the values in bin ``high``, whose lower bits have the counts ``low``."""
    value, ties = descend(low, rest)
    return Cut(high << 16 | value, ties, int(low[value]) == ties)
