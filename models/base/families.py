"""Where the tensors of each architecture live: data, not code. A new family is a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder layer.

    Args:
        layers: path of the layer list inside the causal LM.
        ffn: name of the FFN inside a layer.
        gate, up, down: the three projections of the gated FFN: ``down(act(gate x) * up x)``.
        activation: attribute of the FFN that holds ``act``.
        attention: names of the attention projections.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def projections(self) -> tuple[str, str, str]:
        return (self.gate, self.up, self.down)


#: All six name their parts alike; a family with other names gives them as arguments.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(),
}


def family_of(config: Any) -> Family:
    """The family of a transformers config; a UserError lists the known ones."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"--model_name_or_path: model type '{kind}' has no row in models/base/families.py; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def decoder_layers(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of decoder layers, also through PEFT's wrappers."""
    # PEFT's wrapper puts two modules in front of every path
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.get_submodule(family.layers)
