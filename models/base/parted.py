"""Tensors of which every process holds a part (FSDP2, ZeRO-3), made whole where a value of all of it is needed."""

from __future__ import annotations

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
