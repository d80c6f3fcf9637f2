"""Where the tensors of each architecture live: data, not code. A new family is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder layer.

    Args:
        layers: path of the layer list inside the causal LM.
        ffn: name of the FFN inside a layer.
        gate, up, down: the three projections of the gated FFN: ``down(act(gate x) * up x)``. Where gate and up have one
            name, they are one matrix, gate's rows first (Phi-3).
        activation: attribute of the FFN that holds ``act``.
        attention: names of the attention projections.
        multiplier, divisor, cap: settings of the config by which the model's forward multiplies or divides its logits, and
            at which it then caps them: ``cap tanh(logits / cap)``. A family ignores settings that only others have.
        windows: which layers attend to the last ``sliding_window`` tokens only: "" none, "all", "some" by ``layer_types``.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    multiplier: str = ""
    divisor: str = ""
    cap: str = ""
    windows: str = ""

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the FFN's matrices, each once."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))

    def ffn_parts(self, of: Callable[[str], T], halve: Callable[[T], tuple[T, T]]) -> tuple[T, T, T]:
        """gate, up and down of whatever ``of`` gives by a projection's name; ``halve`` parts what gate and up share."""
        gate, up = halve(of(self.gate)) if self.gate == self.up else (of(self.gate), of(self.up))
        return gate, up, of(self.down)


#: A family is known when ``tests/models/base/test_families.py`` takes it through every step; its table is
#: docs/reference/families.md.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windows="all"),
    "qwen2": Family(windows="some"),
    "qwen3": Family(windows="some"),
    "gemma": Family(),
    "gemma2": Family(cap="final_logit_softcapping", windows="some"),
    # the norms around the FFN (also Gemma 2's and OLMo 2's) lie in the layer, so whatever stands in for the FFN keeps them
    "gemma3_text": Family(cap="final_logit_softcapping", windows="some"),
    "olmo2": Family(),
    # its other multipliers are in layers, attention and embeddings, which stay the model's own
    "granite": Family(divisor="logits_scaling"),
    "smollm3": Family(windows="some"),
    "cohere": Family(multiplier="logit_scale"),
    "cohere2": Family(multiplier="logit_scale", windows="some"),
    "phi3": Family(gate="gate_up_proj", up="gate_up_proj", activation="activation_fn", attention=("qkv_proj", "o_proj"),
                   windows="all"),
}
#: What a fused MoE is exported as (models/export). Its layers have a FFN for each expert, so nothing is fused from one;
#: attention, masks and head are those of the family that it was fused from, and a token is routed by itself alone.
MIXTURES: dict[str, Family] = {"mixtral": Family(windows="all"), "qwen3_moe": Family(windows="all")}
#: Whose forward is known: which masks it takes, and what it does to logits.
KNOWN_FORWARDS: dict[str, Family] = FAMILIES | MIXTURES


def family_of(config: Any) -> Family:
    """The family of a transformers config; a UserError lists the known ones, and what works with all others."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"--model_name_or_path: model type '{kind}' has no row in models/base/families.py, which says where an FFN "
            f"lies; known: {', '.join(sorted(FAMILIES))}. {_inside(config)}Other models answer (inference.py), are "
            "evaluated, are merged whole (models/fuse.py merge), and train with --lora_targets or --tuning full"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"--model_name_or_path: use_bidirectional_attention is set in this {kind}: its tokens see later "
                        "ones, so it cannot learn to write them; give a causal model")
    return FAMILIES[kind]


def _inside(config: Any) -> str:
    """What to do with a model that holds a known one beside a vision tower or the like."""
    text = getattr(config, "text_config", None)
    kind = text.get("model_type") if isinstance(text, dict) else getattr(text, "model_type", None)
    return f"Its text model is of the known type {kind}: give that alone. " if kind in FAMILIES else ""


def decoder_layers(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of decoder layers, also through PEFT's wrappers."""
    # PEFT's wrapper puts two modules in front of every path
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.get_submodule(family.layers)
