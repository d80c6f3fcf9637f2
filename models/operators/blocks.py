"""A tensor of every input, walked in blocks of fixed size, so that results depend on neither memory nor workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.operators.spans import spans

#: One step of numpy's Philox counter gives four 64-bit words, that is eight 32-bit draws.
_DRAWS = 8


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


def uniform(seed: int, name: str, which: int, first: int, count: int) -> Tensor:
    """Draws from U[0, 1) for elements first .. first + count of a tensor, a function of (seed, input, tensor, index) alone.

    Philox4x64-10 (Salmon et al. 2011) keyed by a hash of seed, tensor name and input; the counter is the index.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}|{which}|{name}".encode(), digest_size=16).digest(), "little")
    skip = first % _DRAWS
    generator = np.random.Generator(np.random.Philox(key=key, counter=first // _DRAWS))
    return torch.from_numpy(generator.random(skip + count, dtype=np.float32)[skip:])


class MemoryBlocks:
    """Blocks of tensors that are in memory already. The executor has its twin for files (``execute.FileBlocks``)."""

    def __init__(self, base: Tensor | None, experts: Sequence[Tensor], name: str = "", seed: int = 0,
                 by_rows: bool = False) -> None:
        self.base, self.experts, self.name, self.seed, self.by_rows = base, experts, name, seed, by_rows
        self.shape = tuple((experts[0] if experts else base).shape)

    def __iter__(self) -> Iterator[Block]:
        for first, shape in spans(self.shape, self.by_rows):
            def cut(tensor: Tensor, first: int = first, shape: tuple[int, ...] = shape) -> Tensor:
                flat = tensor.reshape(-1)[first:first + prod(shape)]
                return flat.to(torch.float32, copy=True).view(shape)

            yield Block(first, None if self.base is None else cut(self.base), [cut(e) for e in self.experts])

    def uniform(self, which: int, block: Block) -> Tensor:
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
    done = [fused.reshape(-1).clone() for fused in method.load()(blocks, parameters)]
    return torch.cat(done).view(blocks.shape) if done else torch.empty(blocks.shape)
