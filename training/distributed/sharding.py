"""A model parted among processes by FSDP2 (torch's ``fully_shard``): one layer at a time is whole.

Parted here and not by accelerate, so that the output head, which the losses read as a weight, stays with the root, that
what is frozen keeps its dtype, and that processes on CPUs can do it too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from flags.launch import Sharding
from models.base import attention
from models.base.parted import is_parted, whole


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Part a model in place: a unit for each decoder layer, one for all else, which stays whole during a step.

    Args:
        model: on the CPU, the same on every process; its forward pass is the outermost that runs.
        device: this process's, to which its parts go, layer by layer: the whole never lies there.
    """
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    # it was put together with the CPU's attention
    if device.type != "cpu":
        inner.set_attn_implementation(attention.implementation_for(inner.config, device))
    processes = dist.get_world_size()

    def place(parameter: nn.Parameter) -> Shard | None:
        # rows, but where some processes would get none (a router has a row per expert): then an axis that divides evenly
        if parameter.ndim == 0 or parameter.shape[0] >= processes:
            return None
        even = [axis for axis, size in enumerate(parameter.shape) if size % processes == 0]
        return Shard(even[0]) if even else None

    options = {"mesh": init_device_mesh(device.type, (processes,)), "shard_placement_fn": place,
               "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy()}
    layers = set(inner._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=sharding.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def reshard(model: nn.Module) -> None:
    """Let go of what a pass without gradients left whole: the root's weights, which a backward pass would part again.

    An optimiser made meanwhile would train the whole copies, and no one's part.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_state(model: nn.Module, trained: bool = False) -> dict[str, Tensor] | None:
    """Whole tensors of a parted model on the first process's CPU, one at a time; None for a model that is whole.

    Every process must ask; the others get an empty one.

    Args:
        trained: those that train alone.
    """
    # the parameters themselves, so that tied weights are told by being one
    named = model.state_dict(keep_vars=True)
    if not any(map(is_parted, named.values())):
        return None
    kept: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, tensor in named.items():
        if trained and not tensor.requires_grad:
            continue
        if id(tensor) not in made:
            full = whole(tensor).detach()
            made[id(tensor)] = full.to("cpu", copy=True) if dist.get_rank() == 0 else full.new_empty(0)
        kept[name] = made[id(tensor)]
    return kept
