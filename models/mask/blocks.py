"""Tensors walked block by block, so that nothing of a whole weight's size is made beside the weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.mask.units import Units
from models.operators.spans import BLOCK


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Flat blocks that fit a core's cache; on a GPU one block, which is one kernel per operation."""
    size = tensor.numel()
    step = BLOCK if tensor.device.type == "cpu" else max(size, 1)
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def length(block: slice) -> int:
    """Entries of a block."""
    return block.stop - block.start


def piece(tensor: Tensor, block: slice) -> Tensor:
    """A block of a contiguous tensor, (block,): a view, without a graph."""
    return tensor.detach().view(-1)[block]


def spread(units: Units | None, mask: Tensor | None, block: slice, device: torch.device) -> Tensor:
    """The mask of a block's entries, (block,), or (1,) where one value stands for all.

    Args:
        mask: of the tensor's units, (units,); None: no mask, which is 1.
        block: of the tensor's entries, flat.
    """
    if units is None or mask is None:
        return torch.ones(1, device=device)
    if units.single:
        return mask[block]
    grid = units.expand(mask)  # (rows, columns), or 1 in place of either
    if grid.numel() == 1:
        return grid.reshape(1)
    _, columns = units.matrix
    # whole rows that cover the block, spread out, then cut to it: a block may start and end within a row
    top, bottom = block.start // columns, -(-block.stop // columns)
    covering = grid if grid.shape[0] == 1 else grid[top:bottom]
    start = block.start - top * columns
    return covering.expand(bottom - top, columns).reshape(-1)[start:start + length(block)]
