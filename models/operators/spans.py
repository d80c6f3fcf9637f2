"""How a tensor is cut into blocks. A function of its shape alone, so that results depend on neither memory nor workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

#: Elements per block: fits a core's cache with a handful of inputs, and is large enough to hide the interpreter.
BLOCK = 1 << 18


def spans(shape: Sequence[int], by_rows: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(first flat index, block shape) of a tensor's blocks: flat ones of BLOCK elements, or as many whole rows."""
    size = prod(shape)
    if not size:
        return
    columns = (shape[-1] if shape else 1) if by_rows else 1
    step = max(1, BLOCK // columns) * columns
    for first in range(0, size, step):
        count = min(step, size - first)
        yield first, ((count // columns, columns) if by_rows else (count,))
