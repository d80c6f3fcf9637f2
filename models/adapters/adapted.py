"""MODEL+ADAPTER as an input: a checkpoint whose blocks have B A added as they are read. The sum is made in fp32.

mergekit lets PEFT write the sum in the base's type first: of a bf16 base that rounds once more than here. Factors are read
tensor by tensor from the adapter's file, so that a merge keeps its memory promise whatever the adapter's size.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from errors import UserError
from models.adapters.changed import Change, ChangedCheckpoint, Factor
from models.checkpoints.reader import Checkpoint

#: lora_A.default.weight
_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(\.weight)$")


class AdaptedCheckpoint(ChangedCheckpoint):
    """An open model with an open adapter on it."""

    adapter: Path

    @classmethod
    def over(cls, base: Checkpoint, adapter: Path, name: str, stack: ExitStack) -> AdaptedCheckpoint:
        """A view of an open base.

        Args:
            adapter: a PEFT LoRA's folder.
            name: MODEL+ADAPTER, for messages.

        Raises:
            UserError: no LoRA adapter there, or one that is no sum of B A over the base's tensors.
        """
        view = cls.of(base, {tensor: (change,) for tensor, change in adapter_changes(base, adapter, name, stack).items()})
        view.adapter = adapter
        return view


def adapter_changes(base: Checkpoint, adapter: Path, name: str, stack: ExitStack, weight: float = 1.0,
                    untied: str = "") -> dict[str, Change]:
    """The base's tensor -> what an adapter adds to it; the adapter's file stays open as long as ``stack``.

    Args:
        name: of the adapter, for messages.
        weight: factor on all of it.
        untied: what the base's embedding is called, where a change of a tied head may stand under "lm_head.weight".

    Raises:
        UserError: no LoRA adapter there, or one that is no sum of B A over the base's tensors.
    """
    # loads torch: only where an adapter is named
    from models.adapters.files import WEIGHTS, read_adapter, transposed

    # read whole once, for every check that fuse adapters makes, and let go: the blocks read their factors again
    known = read_adapter(adapter, name)
    scales, config = known.scales, known.config
    del known
    file = stack.enter_context(Checkpoint.open(adapter / WEIGHTS))
    # state_dict() puts the adapter's name into the key, save_pretrained does not
    factors = {_NAME.sub(r"\1\2", key): info for key, info in file.tensors.items()}
    changes, problems = {}, []
    for module, scale in scales.items():
        tensor = _tensor(module, base)
        a, b = (Factor.whole(file, factors[f"base_model.model.{module}.lora_{part}.weight"]) for part in "AB")
        turned = transposed(config, base.config, module)
        shape = (b.rows, a.columns)[:: -1 if turned else 1]
        tied = tensor not in base.tensors and tensor.endswith("lm_head.weight")
        info = base.tensors.get(untied if tied else tensor)
        if info is None:
            problems.append(f"{name}: the adapter changes {module}, but {base.folder} has no tensor {tensor}" + (
                ": its head is its embedding, which the adapter does not mean; save the model untied" if tied else
                "; name the model that it was trained on"))
        elif info.shape != shape:
            problems.append(f"{name}: {tensor} is {list(info.shape)}, the adapter's change {list(shape)}; "
                            "name the model that it was trained on")
        elif info.dtype not in ("F32", "F16", "BF16", "F64"):
            problems.append(f"{name}: {tensor} is {info.dtype}: an adapter cannot be added to packed weights")
        else:
            changes[tensor] = Change(a, b, scale * weight, turned)
    if problems:
        raise UserError(*problems)
    return changes


def _tensor(module: str, base: Checkpoint) -> str:
    """The base's name of a module's weight: a model saved from its base class has it without the first word."""
    tensor = f"{module}.weight"
    inner = tensor.partition(".")[2]
    return inner if tensor not in base.tensors and inner in base.tensors else tensor
