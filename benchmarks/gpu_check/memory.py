"""What --plan tells of a part, beside what the device held of it.

Three sizes are told apart, each with its own figure in the plan (``models/footprint/strategies.py``):

- allocated: tensors, ``max_memory_allocated``; the plan's ``tensors``. This pair is held to ``BAR``.
- reserved: what torch's allocator keeps for them, ``max_memory_reserved``; the plan's ``tensors`` and ``allocator``.
- device: reserved, and what CUDA and its libraries hold beside it; the plan's ``peak``, which --plan promises and --plan_gb
  is compared with.
"""

from __future__ import annotations

import gc
import resource
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Share by which a plan of the tensors may be off, as in benchmarks/memory/planned.py.
BAR = 0.15


def start(device: torch.device) -> None:
    """Count the most from here on; what was freed before is given back."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held(device: torch.device) -> dict[str, int]:
    """The most bytes since ``start``: allocated, reserved, device; of a CPU what the process ever had resident."""
    if device.type != "cuda":
        return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    import torch

    reserved = torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    # whatever is taken of the device and not by torch's allocator: the context, kernels' code, libraries' workspaces
    beside = total - free - torch.cuda.memory_reserved()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": reserved, "device": reserved + beside}


def planned(parsed: Any, place: Any, tokens: int = 0) -> dict[str, float]:
    """What --plan tells of a command line on this place's model, in bytes: allocated, reserved, device.

    Args:
        parsed: as ``config.parse`` gives it.
        place: a ``place.Place``.
        tokens: of the longest row or prompt, as --plan_tokens; 0: --model_max_length.
    """
    from models.footprint.command import footprint
    from models.footprint.training import Place as Where

    found = footprint(parsed.args, parsed.training, place.shape.counted(),
                      Where(place.device.type == "cuda", place.dtype.itemsize), tokens)
    return {"allocated": found.tensors, "reserved": found.tensors + found.allocator, "device": found.peak}


def compared(plan: dict[str, float] | None, found: dict[str, int]) -> dict[str, Any]:
    """A row's entries: plan and held bytes, by how much each of the plan's figures is off, and the peak of the part.

    The peak is what was allocated, of a CPU what was resident: no figure of the plan is held to that.
    """
    off = {name: plan[name] / found[name] - 1 for name in found if name in plan} if plan else {}
    return {"plan_bytes": plan, "held_bytes": found, "plan_off_by": off,
            "peak_gib": found.get("allocated", found.get("resident", 0)) / 2**30}
