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
        """(rows, columns) of the tensor: further dimensions lie along the columns, a vector is one column."""
        return matrix_of(self.shape)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups down and across; those at the edge are smaller, hence rounded up."""
        rows, columns = self.matrix
        return -(-rows // self.rows), -(-columns // self.columns)

    @property
    def size(self) -> int:
        """How many units, so many logits."""
        return max(self.index) + 1 if self.index is not None else prod(self.grid)

    @property
    def single(self) -> bool:
        """Whether every entry has a logit of its own."""
        return self.index is None and self.rows == self.columns == 1

    @property
    def counts(self) -> Tensor | None:
        """Entries per unit, (size,) fp64; None: one each."""
        if self.single:
            return None
        if self.index is not None:
            # one each by choice: a component counts once in the mask's mean, however many tasks and rows bear it
            return torch.ones(self.size, dtype=torch.float64)
        return self.reduce(torch.ones(self.matrix, dtype=torch.float64))

    def expand(self, values: Tensor) -> Tensor:
        """Unit values (size,) -> (rows, columns), or 1 in place of either where one value stands for all."""
        rows, columns = self.matrix
        if self.index is not None:
            unit_of_column = torch.tensor(self.index, device=values.device)
            return (values[unit_of_column.clamp_min(0)] * (unit_of_column >= 0))[None]
        grid = values.view(self.grid)
        # a side with a single group is left to broadcast: a mask by rows is never spread out over a weight's columns
        if self.rows > 1 and self.grid[0] > 1:
            grid = grid.repeat_interleave(self.rows, 0)[:rows]
        if self.columns > 1 and self.grid[1] > 1:
            grid = grid.repeat_interleave(self.columns, 1)[:, :columns]
        return grid

    def reduce(self, values: Tensor) -> Tensor:
        """Sums of entries, of any shape with as many, over units, (size,); for single entries a view of them."""
        rows, columns = self.matrix
        values = values.reshape(rows, columns)
        if self.index is not None:
            unit_of_column = torch.tensor(self.index, device=values.device)
            # a column of unit -1 adds its zero to unit 0
            sums = values.sum(0) * (unit_of_column >= 0)
            return values.new_zeros(self.size).index_add_(0, unit_of_column.clamp_min(0), sums)
        if self.single:
            return values.reshape(-1)
        down, across = self.grid
        # filled up with zeros, which add nothing, so that all groups are of one size
        padded = F.pad(values, (0, across * self.columns - columns, 0, down * self.rows - rows))
        return padded.view(down, self.rows, across, self.columns).sum((1, 3)).reshape(-1)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor; (1, 1) of a number."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True)
class RankLayout:
    """Where rank components lie: along the columns of B (out, width), and along the rows of A (width, in).

        aligned model's rank | R components of task 0 | R components of task 1 | ...

    The aligned columns bear no logit. Component i has one logit in all tasks, so R logits in all.

    Args:
        aligned_rank: rank of the aligned model's own adapter; 0: it has none.
        components: R, common to the tasks.
    """

    aligned_rank: int
    components: int
    tasks: int

    @property
    def width(self) -> int:
        """Columns of B in all."""
        return self.aligned_rank + self.tasks * self.components

    @property
    def aligned_columns(self) -> slice:
        return slice(0, self.aligned_rank)

    def columns_of_task(self, task: int) -> slice:
        """A task's columns, its components largest first."""
        first = self.aligned_rank + task * self.components
        return slice(first, first + self.components)

    def units(self, out: int) -> Units:
        """The units of B, (out, width)."""
        unit_of_column = (*[-1] * self.aligned_rank, *(list(range(self.components)) * self.tasks))
        return Units((out, self.width), out, 1, unit_of_column)


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
    rows, columns = matrix_of(shape)
    if granularity == "row":
        return Units(shape, 1, columns)
    if granularity == "block":
        # a vector is one column: its blocks lie down it
        return Units(shape, 1, min(block, columns)) if columns > 1 else Units(shape, min(block, rows), 1)
    if granularity == "layer":
        return Units(shape, rows, columns)
    if granularity == "head":
        return _head_units(name, shape, head_size(config), part)
    return Units(shape)


def _head_units(name: str, shape: tuple[int, ...], size: int, part: str) -> Units:
    """A unit per head of ``size`` rows or columns; a row each where the tensor has no heads, or no whole number of them."""
    rows, columns = matrix_of(shape)
    modules = name.split(".")
    has_heads = len(shape) == 2 and size > 0
    # the rank side of a factor has no heads, also where it happens to be a multiple of their size
    if has_heads and part != "A" and any(module in _HEADS_OUT for module in modules) and not rows % size:
        return Units(shape, size, columns)
    if has_heads and part != "B" and any(module in _HEADS_IN for module in modules) and not columns % size:
        return Units(shape, rows, size)
    return Units(shape, 1, columns)


def head_size(config: Mapping[str, Any]) -> int:
    """Entries of a head, 0 when the configuration does not tell."""
    if config.get("head_dim"):
        return int(config["head_dim"])
    heads = config.get("num_attention_heads")
    return int(config["hidden_size"]) // int(heads) if heads and config.get("hidden_size") else 0
