"""--device_map auto: one model over all GPUs that a process sees, layer by layer, for answers and scores.

The map is accelerate's, made from names and shapes before a weight is read; its hooks carry what a layer reads to where the
layer lies. All weights are on GPUs: an adapter is summed where its matrix is, and what is offloaded has no place of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

from errors import UserError

#: The part of each device's free memory that weights may take; the rest is for keys and values, activations and one matrix
#: at a time in fp32.
SHARE = 0.85
GIB = 2**30


def wanted(args: Any) -> bool:
    """Whether a command's model shall be spread; commands that train have no such flag."""
    return hasattr(args, "device_map") and args.device_map == "auto"


def check(args: Any) -> None:
    """A UserError where a model shall be spread and torch sees no GPU; flags/base.py says what the flags alone tell."""
    if wanted(args) and not torch.cuda.is_available():
        raise UserError("--device_map auto: spreads a model over GPUs, and torch sees none here; drop it, the model then "
                        "answers on the CPU")


def over_devices(model: nn.Module, dtype: torch.dtype, name: str) -> dict[str, int]:
    """Module -> the number of its GPU, about the same on each of them.

    Args:
        model: without weights, on the meta device.
        dtype: in which it will be held.
        name: how messages call it.

    Raises:
        UserError: it does not fit into what is free on all GPUs.
    """
    free = {number: int(SHARE * torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count())}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    balanced = get_balanced_memory(model, free, whole, dtype)
    found = infer_auto_device_map(model, balanced, whole, dtype)
    # balanced leaves the last device what is over; where layers do not divide well, all that there is is allowed
    if _left(found):
        found = infer_auto_device_map(model, free, whole, dtype)
    if left := _left(found):
        needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
        raise UserError(f"--device_map auto: {name} takes {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
                        f"and {len(free)} GPUs have {sum(free.values()) / GIB:.1f} GiB for weights; {left[0]} and "
                        f"{len(left) - 1} more modules have no place; free memory, or use more GPUs or a smaller --dtype")
    return found


def _left(found: dict[str, Any]) -> list[str]:
    return [name for name, place in found.items() if place in ("cpu", "disk")]


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens."""
    return model.get_input_embeddings().weight.device
