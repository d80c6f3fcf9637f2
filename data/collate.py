"""Rows to batches: padding on the right, the objective beside its sample, mixing of objectives."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data.encode import IGNORE
from data.records import OBJECTIVES, Row


def pad_rows(rows: Sequence[dict[str, Any]], pad_id: int, length: int | None = None) -> dict[str, Tensor]:
    """A batch: input_ids, labels, attention_mask (batch, time) and objectives (batch,).

    Args:
        length: pad to this many tokens; None pads to the longest row.
    """
    longest = length or max(len(row["input_ids"]) for row in rows)
    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": pad("input_ids", pad_id),
        "labels": pad("labels", IGNORE),
        # from lengths, not from ids: a tokenizer may pad with its EOS, which is a real token elsewhere
        "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long(),
        "objectives": torch.tensor([row["objective"] for row in rows]),
    }


def mix(records: Sequence[Row], limit: int, mixing: str, seed: int,
        limits: Mapping[int, int] = MappingProxyType({})) -> list[Row]:
    """At most ``limit`` rows of each objective (-1: all), drawn with a seed, in the original order.

    Args:
        limits: objective -> the limit that it has instead.
        mixing: ``proportional`` keeps each objective's own count; ``balanced`` gives each the same number, repeating
            rows of the smaller ones.
    """
    groups = [[r for r in records if r.objective == i] for i in range(len(OBJECTIVES))]
    groups = [group for group in groups if group]
    # its own generator: what else draws numbers before must not change the rows
    generator = random.Random(seed)
    most = [limits.get(group[0].objective, limit) for group in groups]
    groups = [_draw(group, min(count, len(group)), generator) if count >= 0 else group
              for group, count in zip(groups, most, strict=True)]
    if mixing == "balanced" and len(groups) > 1:
        size = max(len(group) for group in groups)
        # whole copies and a drawn rest: how often two rows of an objective occur differs by one at most
        groups = [group * (size // len(group)) + _draw(group, size % len(group), generator) for group in groups]
    return [record for group in groups for record in group]


def _draw(group: list[Row], count: int, generator: random.Random) -> list[Row]:
    # back in file order: the draw decides which rows, the sampler of the training in what order
    return [group[i] for i in sorted(generator.sample(range(len(group)), count))]
