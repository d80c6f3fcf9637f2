"""An optimiser's state shared out among processes that hold the same parameters, by whole tensors: ZeRO's first stage
(Rajbhandari et al. 2020, section 5.1).

Each process steps the parameters that are its own and sends them round; of the others it never makes moments. Gradients
must be the same everywhere by then. Nothing changes in the numbers. torch's ZeroRedundancyOptimizer does the same, and
gathers all moments on one process for a checkpoint, where they need not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def owners(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process each parameter belongs to: the largest first, to whom has least, of equals the first."""
    held, found = [0] * processes, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[number] = held.index(min(held))
        held[found[number]] += sizes[number]
    return found


def share_out(optimizer: torch.optim.Optimizer, rank: int, processes: int) -> frozenset[int]:
    """Let this process step its own parameters alone from now on; every process must ask. The numbers of its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owner_of = owners([p.numel() for p in parameters], processes)

    def leave_others(*_: Any) -> None:
        for parameter, owner in zip(parameters, owner_of, strict=True):
            if owner != rank:
                parameter.grad = None

    def send_round(*_: Any) -> None:
        sent = [dist.broadcast(p.detach(), owner, async_op=True) for p, owner in zip(parameters, owner_of, strict=True)]
        for work in sent:
            work.wait()

    optimizer.register_step_pre_hook(leave_others)
    optimizer.register_step_post_hook(send_round)
    return frozenset(number for number, owner in enumerate(owner_of) if owner == rank)
