"""MODEL+ADAPTER as an input: a checkpoint whose blocks have B A added as they are read. The sum is made in fp32.

mergekit lets PEFT write the sum in the base's type first: of a bf16 base that rounds once more than here. Factors are read
tensor by tensor from the adapter's file, so that a merge keeps its memory promise whatever the adapter's size.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError
from models.checkpoints.header import KINDS, TensorInfo
from models.checkpoints.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


#: lora_A.default.weight
_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(\.weight)$")


class AdaptedCheckpoint(Checkpoint):
    """An open model with an open adapter on it; read like any other, values in fp32 where the adapter changes them."""

    @classmethod
    def over(cls, base: Checkpoint, adapter: Path, name: str, stack: ExitStack) -> AdaptedCheckpoint:
        """A view of an open base.

        Args:
            adapter: a PEFT LoRA's folder.
            name: MODEL+ADAPTER, for messages.

        Raises:
            UserError: no LoRA adapter there, or one that is no sum of B A over the base's tensors.
        """
        # loads torch: only for recipes that name an adapter
        from models.adapters.files import WEIGHTS, read_adapter, transposed

        # read whole once, for every check that fuse adapters makes, and let go: the blocks read their factors again
        known = read_adapter(adapter, name)
        scales, config = known.scales, known.config
        del known
        view = cls(**{key: getattr(base, key) for key in ("folder", "files", "metadata", "config", "_streams", "_closing")},
                   tensors=dict(base.tensors))
        view.adapter, view.file = adapter, stack.enter_context(Checkpoint.open(adapter / WEIGHTS))
        view.changes = {}
        # state_dict() puts the adapter's name into the key, save_pretrained does not
        factors = {_NAME.sub(r"\1\2", key): info for key, info in view.file.tensors.items()}
        problems = []
        for module, scale in scales.items():
            tensor = _tensor(module, base)
            a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            turned = transposed(config, base.config, module)
            shape = (b.shape[0], a.shape[1])[:: -1 if turned else 1]
            info = base.tensors.get(tensor)
            if info is None:
                tied = tensor.endswith("lm_head.weight")
                problems.append(f"{name}: the adapter changes {module}, but {base.folder} has no tensor {tensor}" + (
                    ": its head is its embedding, which the adapter does not mean; save the model untied" if tied else
                    "; name the model that it was trained on"))
            elif info.shape != shape:
                problems.append(f"{name}: {tensor} is {list(info.shape)}, the adapter's change {list(shape)}; "
                                "name the model that it was trained on")
            elif info.dtype not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"{name}: {tensor} is {info.dtype}: an adapter cannot be added to packed weights")
            else:
                view.changes[tensor] = (a, b, scale, turned)
        if problems:
            raise UserError(*problems)
        return view

    def extra_bytes(self, info: TensorInfo) -> int:
        """What reading a block of this tensor takes beside the block: fp32 factors, each with its raw bytes."""
        if info.name not in self.changes:
            return 0
        a, b, _, _ = self.changes[info.name]
        return 8 * (prod(a.shape) + prod(b.shape))

    def read(self, info: TensorInfo, first: int, count: int, out: Tensor) -> Tensor:
        """As the base's; where the adapter changes the tensor, (count,) fp32 values of a buffer of their own."""
        values = super().read(info, first, count, out)
        change = self.changes.get(info.name)
        if change is None or not count:
            return values
        a, b, scale, turned = change
        columns = info.shape[1]
        top, bottom = first // columns, (first + count - 1) // columns + 1
        # W + B A, or its transpose where the weight is kept as (in, out)
        if turned:
            left, right = self._factor(a)[:, top:bottom].T, self._factor(b).T
        else:
            left, right = self._factor(b, top, bottom), self._factor(a)
        delta = (left @ right).mul_(scale).reshape(-1)
        start = first - top * columns
        return delta[start:start + count].add_(values)

    def equal(self, one: TensorInfo, two: TensorInfo) -> bool:
        """As the base's; a tensor that the adapter changes is no copy of another, whatever its bytes were."""
        return one.name not in self.changes and two.name not in self.changes and super().equal(one, two)

    def _factor(self, info: TensorInfo, top: int = 0, bottom: int | None = None) -> Tensor:
        """Rows of a factor, fp32."""
        import torch

        rows = (info.shape[0] if bottom is None else bottom) - top
        count = rows * info.shape[1]
        raw = torch.empty(count * KINDS[info.dtype][0], dtype=torch.uint8)
        return self.file.read(info, top * info.shape[1], count, raw).float().view(rows, info.shape[1])


def _tensor(module: str, base: Checkpoint) -> str:
    """The base's name of a module's weight: a model saved from its base class has it without the first word."""
    tensor = f"{module}.weight"
    inner = tensor.partition(".")[2]
    return inner if tensor not in base.tensors and inner in base.tensors else tensor
