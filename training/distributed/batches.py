"""Which rows a step trains on: batches of like lengths, the same ones on one process and on many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from data.encode import IGNORE

#: Batches whose rows are sorted by length together, then shuffled as batches.
_BUCKET = 16
#: The objective of a row that fills a batch up and counts for nothing.
BLANK = -1


class BucketSampler(Sampler):
    """Batches of rows of similar length, in an order that depends on (seed, epoch) alone.

    Args:
        lengths: tokens of each row.
        group: rows of one optimiser step over all devices and micro-batches.
        filled: end a short last group with the number of rows, the place of a blank one: processes then get equally many
            rows. Without it, accelerate fills with rows of the epoch's start, which would count twice.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int, filled: bool = False) -> None:
        self.lengths, self.group, self.seed, self.filled, self.epoch = lengths, group, seed, filled, 0

    # accelerate's data loader calls this before each epoch, also when a resumed run skips what it has seen
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def blanks(self) -> int:
        return -len(self.lengths) % self.group if self.filled else 0

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self):
        # so far apart that no epoch of one seed draws the stream of another's
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        bucket = self.group * _BUCKET
        batches = []
        for start in range(0, len(order), bucket):
            # like lengths beside each other: a batch is padded to its longest row
            rows = sorted(order[start : start + bucket], key=lambda i: self.lengths[i])
            batches += [rows[i : i + self.group] for i in range(0, len(rows), self.group)]
        # a short batch must come last: the data loader cuts the stream into equal groups
        short = [batch for batch in batches if len(batch) < self.group]
        full = [batch for batch in batches if len(batch) == self.group]
        # shuffled once more, else every bucket would train from its shortest rows to its longest
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in short:
            yield from batch
        yield from [len(self.lengths)] * self.blanks


def with_blank(rows: Sequence[dict[str, Any]], pad_id: int) -> list[dict[str, Any]]:
    """The rows and, behind them, the one that ``BucketSampler`` fills up with: a token without a label."""
    return [*rows, {"input_ids": [pad_id], "labels": [IGNORE], "objective": BLANK}]
