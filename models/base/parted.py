"""Tensors of which every process holds a part (FSDP2, ZeRO-3), made whole where a value of all of it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all of its parts; every process must ask, and all get the same.

    Under FSDP2 with its gradient: what comes back counts as the same on every process, as for a term of weights alone.
    """
    # by what they can do, not by their classes: torch's module of sharded tensors takes a second to import
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def is_parted(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def own_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; the tensor itself where it is whole."""
    return getattr(tensor, "_local_tensor", tensor)


def first_row(tensor: Tensor) -> int:
    """The row of the whole that this process's part begins with, of a tensor parted by rows; 0 where it is whole."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    # as torch.chunk cuts: all parts but the last ones have as many rows, rounded up
    return min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)


def same_rows(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the rows that this process holds of another one; ``whole`` itself where that one is whole."""
    if not hasattr(like, "device_mesh"):
        return whole
    first = first_row(like)
    # a copy: a view would keep all of it
    return whole[first:first + own_part(like).shape[0]].clone()


def parted_like(part: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` parted by rows as ``like`` is, of which this process has ``part``; where ``like`` is whole,
    ``part`` itself."""
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape),
                              stride=strides)


def summed(value: float, like: Tensor) -> float:
    """The sum of a number over the processes that hold parts of a tensor; the number itself where it is whole."""
    if not hasattr(like, "device_mesh"):
        return value
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.float64, device=like.device_mesh.device_type)
    dist.all_reduce(total, group=like.device_mesh.get_group())
    return float(total)
