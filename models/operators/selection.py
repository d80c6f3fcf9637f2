"""The k entries of largest magnitude, exactly k, over tensors that are only seen in blocks.

Radix selection on the bits of fp32 magnitudes: one walk counts the upper 15 bits and finds the bin of the k-th largest, a
second counts the lower 16 within that bin. Two walks and two small tables, whatever the size, and no sorting. Published
code takes a quantile, which keeps a few entries more or less than k where magnitudes tie; bf16 weights tie everywhere.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Bins of the two tables. The sign bit is masked off, so the upper half of a magnitude has 15 bits.
_HIGH, _LOW = 1 << 15, 1 << 16
_ALL = -1

#: Starts a walk; every step gives one block of fp32 values per tensor.
Walk = Callable[[], Iterable[Sequence[Tensor]]]


@dataclass
class MagnitudeCut:
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

    def fresh(self) -> MagnitudeCut:
        """A copy that starts at the tensor's first element: masks consume ``ties`` as they go."""
        return replace(self)

    def keep(self, values: Tensor) -> Tensor:
        """A block's values, 0 where they are not kept; blocks must come in order of their flat index."""
        if self.threshold == _ALL:
            return values
        if self.threshold == NOTHING.threshold:
            return values.zero_()
        # hardshrink is one pass where a mask takes several; it keeps what is strictly above its threshold
        if self.all_ties:
            return torch.hardshrink(values, magnitude_of(self.threshold - 1))
        if not self.ties:
            # from the block on where the ties are used up, all that equals the threshold goes
            return torch.hardshrink(values, magnitude_of(self.threshold))
        return values.mul_(self.mask(values))

    def mask(self, values: Tensor) -> Tensor:
        """Which of a block's values are kept, bool of their shape; as ``keep``."""
        bits = magnitude_bits(values)
        if self.threshold == _ALL:
            return torch.ones_like(bits, dtype=torch.bool)
        keep = bits > self.threshold
        if self.ties:
            equal = bits == self.threshold
            there = int(equal.sum())
            if there > self.ties:
                places = equal.view(-1).nonzero().squeeze(1)
                equal.view(-1)[places[self.ties:]] = False
            self.ties -= min(there, self.ties)
            keep |= equal
        return keep


NOTHING = MagnitudeCut(torch.iinfo(torch.int32).max, 0)
EVERYTHING = MagnitudeCut(_ALL, 0)


def count(density: float, size: int) -> int:
    """How many of ``size`` a share is: rounded down, but never to nothing for a share above 0."""
    # the small term undoes the last bit of products such as 0.29 * 100
    return min(size, max(math.floor(density * size + 1e-6), 1 if density > 0 and size else 0))


def magnitude_of(bits: int) -> float:
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
        """(2**16,) int64."""
        self.counts += torch.bincount(self.waiting[:self.size], minlength=_LOW)
        self.size = 0
        return self.counts


def descend(histogram: Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th largest value, how many of that bin are among the k largest)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def cut_at(high: int, low: Tensor, rest: int) -> MagnitudeCut:
    """The cut that keeps ``rest`` of the values in bin ``high``, whose lower bits have the counts ``low``."""
    value, ties = descend(low, rest)
    return MagnitudeCut(high << 16 | value, ties, int(low[value]) == ties)


def find_cuts(walk: Walk, sizes: Sequence[Sequence[int]], total: int) -> list[list[MagnitudeCut]]:
    """The exact k-th largest magnitudes, for several tensors and several k each, in two walks and no sorting.

    Args:
        sizes: per tensor, the k wanted.
        total: elements per tensor.

    Returns:
        a cut for each k. No walk is started when every k is nothing or everything.
    """
    wanted = [(tensor, place, k) for tensor, ks in enumerate(sizes) for place, k in enumerate(ks) if 0 < k < total]
    cuts = [[EVERYTHING if k >= total else NOTHING for k in ks] for ks in sizes]
    if not wanted:
        return cuts
    high = _count_high_bits(walk, {tensor for tensor, _, _ in wanted})
    bins = {(tensor, place): descend(high[tensor], k) for tensor, place, k in wanted}
    # two k of one tensor may end in the same bin, which is then counted once
    low = _count_low_bits(walk, {(tensor, bin_) for (tensor, _), (bin_, _) in bins.items()})
    for (tensor, place), (bin_, rest) in bins.items():
        cuts[tensor][place] = cut_at(bin_, low[tensor, bin_], rest)
    return cuts


def _count_high_bits(walk: Walk, tensors: Iterable[int]) -> dict[int, Tensor]:
    """The first walk: tensor -> counts of its upper bits."""
    counts = {tensor: torch.zeros(_HIGH, dtype=torch.int64) for tensor in sorted(tensors)}
    for blocks in walk():
        for tensor, histogram in counts.items():
            histogram += high_histogram(blocks[tensor]).cpu()
    return counts


def _count_low_bits(walk: Walk, bins: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """The second walk: (tensor, bin of upper bits) -> counts of the lower bits in that bin."""
    counts = {(tensor, bin_): LowHistogram(bin_) for tensor, bin_ in sorted(bins)}
    for blocks in walk():
        for (tensor, _), histogram in counts.items():
            histogram.add(blocks[tensor])
    return {key: histogram.total() for key, histogram in counts.items()}


def trim(values: Tensor, density: float) -> Tensor:
    """TIES' trim of one tensor in memory: its ``count(density, size)`` largest entries, ties to the lowest flat index.

    Args:
        values: any shape and float type; magnitudes are compared in fp32, as everywhere.
    """
    # bit patterns stand for the values here: the masked-off sign leaves a non-negative float with the same magnitude
    bits = magnitude_bits(values.float().contiguous())
    ((cut,),) = find_cuts(lambda: [[bits]], [[count(density, bits.numel())]], bits.numel())
    return values * cut.fresh().mask(bits)


def trim_as_peft(stacked: Tensor, density: float) -> Tensor:
    """(n, ..) -> (n, ..): PEFT 0.21's ``prune`` of each tensor of a stack, for --compat peft.

    Differs from ``trim`` twice: int(density x size) may be one less (0.29 x 100 is 28 there) or 0, and which of equal
    magnitudes stay is torch.topk's choice.
    """
    if density >= 1:
        return stacked
    flat = stacked.flatten(1)
    places = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, places, flat.gather(1, places)).view_as(stacked)
