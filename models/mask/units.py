"""Which entries of a tensor share a logit: single entries, rows, blocks, heads, whole tensors, or LoRA's rank components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRANULARITIES = ("element", "row", "block", "head", "layer", "rank")
#: Where attention heads lie: along the output of these projections, along the input of the last.
_HEADS_OUT, _HEADS_IN = ("q_proj", "k_proj", "v_proj"), ("o_proj",)


@dataclass(frozen=True)
class Units:
    """A grid of groups over a tensor seen as (rows, columns), or one unit per index that columns bear.

    Args:
        shape: of the tensor.
        rows, columns: size of a group; groups at the edge may be smaller.
        index: instead of a grid: each column's unit, -1 for columns that are not masked (``rank``).
    """

    shape: tuple[int, ...]
    rows: int = 1
    columns: int = 1
    index: tuple[int, ...] | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        return (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)

    @property
    def grid(self) -> tuple[int, int]:
        (r, c) = self.matrix
        return -(-r // self.rows), -(-c // self.columns)

    @property
    def size(self) -> int:
        return max(self.index) + 1 if self.index is not None else prod(self.grid)

    @property
    def single(self) -> bool:
        """Whether every entry has a logit of its own."""
        return self.index is None and self.rows == self.columns == 1

    @property
    def counts(self) -> Tensor | None:
        """Entries per unit, (size,) fp64; None: one each."""
        return None if self.single else self.reduce(torch.ones(self.matrix, dtype=torch.float64)) if self.index is None \
            else torch.ones(self.size, dtype=torch.float64)

    def expand(self, values: Tensor) -> Tensor:
        """Unit values -> (rows, columns), or a shape that broadcasts to it."""
        r, c = self.matrix
        if self.index is not None:
            places = torch.tensor(self.index, device=values.device)
            return (values[places.clamp_min(0)] * (places >= 0))[None]
        grid = values.view(self.grid)
        if self.rows > 1 and self.grid[0] > 1:
            grid = grid.repeat_interleave(self.rows, 0)[:r]
        if self.columns > 1 and self.grid[1] > 1:
            grid = grid.repeat_interleave(self.columns, 1)[:, :c]
        return grid

    def reduce(self, values: Tensor) -> Tensor:
        """Sums of entries over units, (size,)."""
        r, c = self.matrix
        values = values.reshape(r, c)
        if self.index is not None:
            places = torch.tensor(self.index, device=values.device)
            sums = values.sum(0) * (places >= 0)
            return values.new_zeros(self.size).index_add_(0, places.clamp_min(0), sums)
        if self.single:
            return values.reshape(-1)
        down, across = self.grid
        padded = F.pad(values, (0, across * self.columns - c, 0, down * self.rows - r))
        return padded.view(down, self.rows, across, self.columns).sum((1, 3)).reshape(-1)


def units_of(name: str, shape: tuple[int, ...], granularity: str, block: int, config: Mapping[str, Any],
             part: str = "weight") -> Units:
    """The units of a weight or factor.

    Args:
        name: of the weight; its module's name decides where heads lie.
        part: "weight", or a LoRA factor: "A" has the weight's inputs along its columns, "B" the outputs along its rows, and
            the rank, which has no heads, on the other side.
        block: consecutive entries of a row that share a logit, for ``block``.
        config: the model's, for the size of a head. What has no heads gets a logit per row under ``head``.
    """
    rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if granularity == "row":
        return Units(shape, 1, columns)
    if granularity == "block":
        return Units(shape, 1, min(block, columns)) if columns > 1 else Units(shape, min(block, rows), 1)
    if granularity == "layer":
        return Units(shape, rows, columns)
    if granularity == "head":
        size = head_size(config)
        parts = name.split(".")
        out, inner = (len(shape) == 2 and size and part != other and any(word in heads for word in parts)
                      for other, heads in (("A", _HEADS_OUT), ("B", _HEADS_IN)))
        if out and not rows % size:
            return Units(shape, size, columns)
        if inner and not columns % size:
            return Units(shape, rows, size)
        return Units(shape, 1, columns)
    return Units(shape)


def head_size(config: Mapping[str, Any]) -> int:
    """Entries of a head, 0 when the configuration does not tell."""
    if config.get("head_dim"):
        return int(config["head_dim"])
    heads = config.get("num_attention_heads")
    return int(config["hidden_size"]) // int(heads) if heads and config.get("hidden_size") else 0
