"""A checkpoint whose blocks have low-rank changes added as they are read: W + sum_i s_i B_i A_i, summed in fp32.

Factors are read from their own files, block by block, so that memory does not grow with the adapters' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from models.checkpoints.header import KINDS, TensorInfo
from models.checkpoints.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A matrix in an open file, or one of a stack of matrices.

    Args:
        first: flat element at which it begins.
        rows, columns: of the matrix.
    """

    file: Checkpoint
    info: TensorInfo
    rows: int
    columns: int
    first: int = 0

    @classmethod
    def whole(cls, file: Checkpoint, info: TensorInfo) -> Factor:
        return cls(file, info, *info.shape)

    @classmethod
    def of_stack(cls, file: Checkpoint, info: TensorInfo, place: int) -> Factor:
        """Matrix ``place`` of a tensor (n, rows, columns)."""
        _, rows, columns = info.shape
        return cls(file, info, rows, columns, place * rows * columns)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def read(self, top: int = 0, bottom: int | None = None) -> Tensor:
        """Rows ``top`` to ``bottom`` (by default all), fp32."""
        import torch

        rows = (self.rows if bottom is None else bottom) - top
        raw = torch.empty(rows * self.columns * KINDS[self.info.dtype][0], dtype=torch.uint8)
        values = self.file.read(self.info, self.first + top * self.columns, rows * self.columns, raw)
        return values.float().view(rows, self.columns)


@dataclass(frozen=True)
class Change:
    """s B A on a weight, or on some of its rows.

    Args:
        a: (r, in).
        b: (out, r).
        scale: s.
        turned: the weight is kept as (in, out).
        first_row: the weight's row that B's first row belongs to (Phi-3 keeps up below gate in one matrix).
    """

    a: Factor
    b: Factor
    scale: float
    turned: bool = False
    first_row: int = 0

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows of the change as the weight is kept, fp32 (bottom - top, columns); 0 where it has none."""
        if self.turned:
            return (self.a.read()[:, top:bottom].T @ self.b.read().T).mul_(self.scale)
        low, high = (min(max(row - self.first_row, 0), self.b.rows) for row in (top, bottom))
        part = (self.b.read(low, high) @ self.a.read()).mul_(self.scale)
        if high - low == bottom - top:
            return part
        whole = part.new_zeros(bottom - top, part.shape[1])
        start = low + self.first_row - top
        if high > low:
            whole[start:start + high - low] = part
        return whole


#: Told of every changed block: (the tensor, its change, weight and change summed), fp32, before it is rounded.
Observer = Callable[[TensorInfo, "Tensor", "Tensor"], None]
Changed = TypeVar("Changed", bound="ChangedCheckpoint")


class ChangedCheckpoint(Checkpoint):
    """An open model with changes on it; read like any other, values in fp32 where something changes them."""

    changes: Mapping[str, Sequence[Change]]
    observer: Observer | None = None

    @classmethod
    def of(cls: type[Changed], base: Checkpoint, changes: Mapping[str, Sequence[Change]],
           observer: Observer | None = None) -> Changed:
        """A view of an open base.

        Args:
            changes: the base's own name of a tensor -> what is added to it.
        """
        view = cls(**{key: getattr(base, key) for key in ("folder", "files", "metadata", "config", "_streams", "_closing")},
                   tensors=dict(base.tensors))
        view.changes, view.observer = changes, observer
        return view

    def extra_bytes(self, info: TensorInfo) -> int:
        """What reading a block of this tensor takes beside the block: fp32 factors, each with its raw bytes."""
        # one change at a time is read
        return max((8 * (change.a.size + change.b.size) for change in self.changes.get(info.name, ())), default=0)

    def read(self, info: TensorInfo, first: int, count: int, out: Tensor) -> Tensor:
        """As the base's; where a tensor changes, (count,) fp32 values of a buffer of their own."""
        values = super().read(info, first, count, out)
        changes = self.changes.get(info.name)
        if not changes or not count:
            return values
        columns = info.shape[1]
        top, bottom = first // columns, (first + count - 1) // columns + 1
        delta = changes[0].rows(top, bottom)
        for change in changes[1:]:
            delta += change.rows(top, bottom)
        start = first - top * columns
        delta = delta.reshape(-1)[start:start + count]
        if self.observer is None:
            return delta.add_(values)
        total = delta + values
        self.observer(info, delta, total)
        return total

    def equal(self, one: TensorInfo, two: TensorInfo) -> bool:
        """As the base's; a tensor that something changes is no copy of another, whatever its bytes were."""
        return not (self.changes.get(one.name) or self.changes.get(two.name)) and super().equal(one, two)
