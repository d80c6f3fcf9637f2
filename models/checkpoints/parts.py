"""Tensors on disk in parts, by torch.distributed.checkpoint: each process writes its own, any number of them reads.

The files are safetensors whose headers say where a part lies in the whole; no pickle is written or read.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import distribute_tensor

from errors import UserError

#: Folders of a training's checkpoint: parts of what trains, and of the optimiser's state.
WEIGHTS, OPTIMIZER = "weight_shards", "optimizer_shards"
# a line of torch's for each save, which says that nothing is left to do
logging.getLogger("torch.distributed.checkpoint.hf_storage").setLevel(logging.WARNING)


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, parted ones in their parts; every process must ask."""
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, parted or whole, with what a folder holds under their names, however it was parted.

    Under a launcher every process must ask.
    """
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        # that there is one process alone, which is what was said
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in a folder, parts put together; headers are read, no values.

    Raises:
        UserError: parts of a tensor are missing.
    """
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, entry in found.items():
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            raise UserError(f"{folder}: parts of {name} are missing; take another checkpoint")
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}


@torch.no_grad()
def copy_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, of which this process takes its part where it is parted."""
    if hasattr(tensor, "full_tensor"):
        # every process has the value: none is sent
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def in_shape_of(value: Tensor, parameter: Tensor | None) -> Tensor:
    """A moment as its parameter is. A mask's logits are flat where they are whole, and (rows, units in a row) where they are
    parted by rows: a training may go on from the one to the other."""
    parted = hasattr(parameter, "full_tensor")
    axes = (1, 2) if parted else (2, 1)
    if parameter is None or value.numel() != parameter.numel() or (value.ndim, parameter.ndim) != axes:
        return value
    if not parted:
        return value.view(-1)
    room = torch.zeros_like(parameter.detach(), dtype=value.dtype)
    copy_whole(room, value.view(parameter.shape))
    return room
