"""A loaded model's weights as their files have them, for changing a model that was loaded in fewer bits.

W + B A is summed in fp32 and rounded once. Read matrix by matrix, that takes the memory of one matrix; a whole model in
fp32 to sum in takes 27 GB of a 7B one. On a CPU a further reading comes from the file system's cache, which is memory; what
goes to a GPU stays there where there is room (``keeps``).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errors import UserError
from models.checkpoints.header import TensorInfo
from models.checkpoints.reader import Checkpoint

_FLOATING = ("F64", "F32", "F16", "BF16")
#: The part of a GPU's free memory that matrices as they were may take beside the model.
_SHARE = 0.25


class StoredWeights:
    """Matrices of a model in a folder, as stored, on the device where the model that was loaded from it has each.

    Args:
        model: as it was loaded from ``folder``, before anything changed it.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = model
        self._closing = ExitStack()
        self._file = self._closing.enter_context(Checkpoint.open(folder))
        self._same: set[str] = set()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self._closing.close()

    def hold(self, modules: Iterable[str]) -> bool:
        """Whether the files hold a matrix of the name and shape of each module's weight; else transformers made it."""
        there = dict(self.model.named_modules())
        return all((info := self._info(name)) is not None and info.dtype in _FLOATING
                   and info.shape == tuple(there[name].weight.shape) for name in modules)

    def read(self, module: str) -> Tensor | None:
        """A module's weight as it is stored; None where the model was loaded with other values than the file's.

        The first reading compares, so the weight must be as it was loaded: a name and a shape may fit and values stand in
        another order.
        """
        weight, info = self.model.get_submodule(module).weight, self._info(module)
        if info is None:
            raise ValueError(f"{module}: the files hold no weight of this name; ask hold first")
        if len(self._buffer) < info.nbytes:
            # pinned: a device takes it at three times the speed
            self._buffer = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=weight.is_cuda)
        values = self._file.read(info, 0, weight.numel(), self._buffer).view(info.shape).to(weight.device)
        if module not in self._same:
            if not torch.equal(values.to(weight.dtype), weight):
                return None
            self._same.add(module)
        # never the buffer itself: the next reading fills it anew
        return values.clone() if values.data_ptr() == self._buffer.data_ptr() else values

    def exact(self, dtype: torch.dtype) -> bool:
        """Whether the model, held in ``dtype``, has every stored value as it is: nothing was rounded on the way in."""
        kept = {"F64"} if dtype == torch.float64 else set()
        kept |= {torch.float32: {"F32", "F16", "BF16"}, torch.float16: {"F16"}, torch.bfloat16: {"BF16"}}.get(dtype, set())
        return {info.dtype for info in self._file.tensors.values() if info.dtype in _FLOATING} <= kept

    def _info(self, module: str) -> TensorInfo | None:
        tensors, name = self._file.tensors, f"{module}.weight"
        head = self.model.get_output_embeddings()
        if name not in tensors and head is not None and self.model.get_submodule(module) is head:
            # a tied head is stored once, as the embedding
            embedding = self.model.get_input_embeddings()
            name = next(f"{n}.weight" for n, found in self.model.named_modules() if found is embedding)
        # a model saved from its base class has names without the first word
        return tensors.get(name) or tensors.get(name.partition(".")[2])


def keeps(device: torch.device, size: int, held: int) -> bool:
    """Whether ``size`` more bytes of a model's own matrices may stay on a device, so that a sweep reads its factors alone.

    Args:
        held: bytes of them that stay there already.
    """
    return device.type == "cuda" and held + size <= _SHARE * (torch.cuda.mem_get_info(device)[0] + held)


def stored_weights(model: PreTrainedModel, folder: Path) -> StoredWeights | None:
    """None where the files cannot be read by position."""
    try:
        return StoredWeights(model, folder)
    except UserError:
        return None
