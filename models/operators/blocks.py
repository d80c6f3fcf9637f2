"""A tensor of every input, walked in blocks of fixed size, so that results depend on neither memory nor workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from models.operators.noise import uniform
from models.operators.spans import spans


class Undefined(ValueError):
    """A method has no value for these inputs; says what would give it one."""


@dataclass
class Block:
    """One block of every input, fp32, (rows, columns) or flat. A method may overwrite the tensors.

    Args:
        first: flat index of the block's first element in its tensor.
        base: the base's block; None when the method takes none.
        experts: the other inputs' blocks, in order.
    """

    first: int
    base: Tensor | None
    experts: list[Tensor]

    @property
    def required_base(self) -> Tensor:
        """The base's block, for methods that work on task vectors; a ValueError where there is none."""
        if self.base is None:
            raise ValueError("this method needs a base")
        return self.base


class MemoryBlocks:
    """Blocks of tensors that are in memory already. The executor has its twin for files (``execute.FileBlocks``)."""

    def __init__(self, base: Tensor | None, experts: Sequence[Tensor], name: str = "", seed: int = 0,
                 by_rows: bool = False) -> None:
        self.base, self.experts, self.name, self.seed, self.by_rows = base, experts, name, seed, by_rows
        first = experts[0] if experts else base
        if first is None:
            raise ValueError("neither a base nor an expert")
        self.shape = tuple(first.shape)

    def __iter__(self) -> Iterator[Block]:
        # the same blocks as from files: a test on tensors in memory speaks for both
        for first, shape in spans(self.shape, self.by_rows):
            def cut(tensor: Tensor, first: int = first, shape: tuple[int, ...] = shape) -> Tensor:
                # a copy in fp32, for methods overwrite their blocks and sum in fp32 whatever the stored type
                flat = tensor.reshape(-1)[first:first + prod(shape)]
                return flat.to(torch.float32, copy=True).view(shape)

            yield Block(first, None if self.base is None else cut(self.base), [cut(e) for e in self.experts])

    def uniform(self, which: int, block: Block) -> Tensor:
        """Draws for the entries of one input's block, of its shape: the same whatever the block's size."""
        like = block.experts[which]
        return uniform(self.seed, self.name, which, block.first, like.numel()).view(like.shape).to(like.device)


class BlockMethod(Protocol):
    """A row of a table of methods: its function over blocks, and whether a block must hold whole rows."""

    def load(self) -> Callable: ...

    def rows(self, parameters: Any) -> bool: ...


def fuse_tensors(method: BlockMethod, base: Tensor | None, experts: Sequence[Tensor], parameters: Any, name: str = "",
                 seed: int = 0) -> Tensor:
    """A method on whole tensors: (base, experts, parameters) -> fused tensor, fp32, of the same shape."""
    blocks = MemoryBlocks(base, experts, name, seed, method.rows(parameters))
    # a method may yield the buffer of its block, which the next step overwrites
    fused = [block.reshape(-1).clone() for block in method.load()(blocks, parameters)]
    return torch.cat(fused).view(blocks.shape) if fused else torch.empty(blocks.shape)
