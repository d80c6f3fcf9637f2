"""How large a base model is: by its config.json, or by its name where it is one of those that the presets take.

No torch: a config.json of a known family says every shape. ``of_skeleton`` counts any model that transformers knows on the
meta device instead, where nothing takes memory; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Families whose layers are what ``_of_folder`` counts: gated FFN, two norms, and the biases of ``_BIASES``.
_COUNTED = ("llama", "mistral", "qwen2", "granite", "smollm3")
#: Families with a bias on q, k and v.
_BIASES = ("qwen2",)


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers.

    Args:
        parameters: of the whole model, shared ones once.
        keys, queries: width of all key heads, of all query heads of a layer together.
        heads: query heads of a layer.
        tied: whether the output head is the embedding.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    keys: int
    queries: int
    heads: int
    tied: bool = False

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and output head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return (self.parameters - self.embeddings) // self.layers

    @property
    def linear(self) -> int:
        """Parameters of the matrices of all layers: what is held in few bits where a base is quantised."""
        return self.layers * (2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.intermediate)

    def widths(self, modules: tuple[str, ...]) -> tuple[int, int]:
        """(in, out) of these modules of one layer, summed."""
        d, f, q, k = self.hidden, self.intermediate, self.queries, self.keys
        sides = {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d), "gate_proj": (d, f),
                 "up_proj": (d, f), "down_proj": (f, d)}
        found = [sides.get(name, (d, d)) for name in modules]
        return sum(a for a, _ in found), sum(b for _, b in found)

    def matrices(self, modules: tuple[str, ...]) -> int:
        """Parameters of these modules of every layer."""
        sides = (self.widths((name,)) for name in modules)
        return self.layers * sum(a * b for a, b in sides)

    def lora(self, rank: int, modules: tuple[str, ...]) -> int:
        """Numbers of a LoRA on these modules of every layer: rank x (width in + width out) each."""
        return self.layers * rank * sum(self.widths(modules))


FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_7B = Shape(6_738_415_616, 32, 4096, 11008, 32000, 4096, 4096, 32)
_LLAMA_13B = Shape(13_015_864_320, 40, 5120, 13824, 32000, 5120, 5120, 40)
_LLAMA_70B = Shape(68_976_648_192, 80, 8192, 28672, 32000, 1024, 8192, 64)
_SMOL = Shape(134_515_008, 30, 576, 1536, 49152, 192, 576, 9, tied=True)
#: Ends of names, lower case -> what they are; counted from their configurations.
_NAMED = {
    "embedded": _SMOL, "smollm2-135m-instruct": _SMOL,
    "llama-2-7b-hf": _LLAMA_7B, "llama-2-7b-chat-hf": _LLAMA_7B, "wizardlm-7b-uncensored": _LLAMA_7B,
    "tinyllama-1.1b-chat-v1.0": Shape(1_100_048_384, 22, 2048, 5632, 32000, 256, 2048, 32),
    "llama-2-13b-hf": _LLAMA_13B, "llama-2-13b-chat-hf": _LLAMA_13B,
    "llama-2-70b-hf": _LLAMA_70B, "llama-2-70b-chat-hf": _LLAMA_70B,
}
_BILLIONS = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)b(?![a-z\d])")


def shape_of(base: str, billions: float = 0.0) -> Shape | None:
    """The shape of a base; None where neither a configuration nor the name tells it.

    Args:
        billions: parameters in 1e9, where a person gave them.
    """
    found = None if billions else _of_folder(Path(base).expanduser()) or _NAMED.get(base.lower().rpartition("/")[2])
    if found:
        return found
    if not billions and (match := _BILLIONS.search(base.lower())):
        billions = float(match[1])
    return _usual(billions * 1e9) if billions else None


def _usual(parameters: float) -> Shape:
    """What decoders of this size mostly look like: 12 x layers x hidden^2 parameters, hidden 128 x layers."""
    layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    hidden = 128 * layers
    return Shape(int(parameters), layers, hidden, 11 * hidden // 4, 32000, hidden, hidden, layers)


def counted(folder: Path) -> bool:
    """Whether a folder's config.json is of a family whose parameters ``shape_of`` counts exactly."""
    content = _read(folder)
    return content.get("model_type") in _COUNTED and not any(content.get(name) for name in ("attention_bias", "mlp_bias"))


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _of_folder(folder: Path) -> Shape | None:
    content = _read(folder)
    try:
        hidden, layers = int(content["hidden_size"]), int(content["num_hidden_layers"])
        inner, words = int(content["intermediate_size"]), int(content["vocab_size"])
        heads = int(content["num_attention_heads"])
        head = int(content.get("head_dim") or hidden // heads)
        keys = int(content.get("num_key_value_heads") or heads) * head
    # no folder, or a model that is written down otherwise: the name may still tell
    except (LookupError, TypeError, ValueError):
        return None
    queries = heads * head
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    layer += queries + 2 * keys if content.get("model_type") in _BIASES else 0
    tied = bool(content.get("tie_word_embeddings"))
    embeddings = hidden * words * (1 if tied else 2)
    return Shape(layers * layer + embeddings + hidden, layers, hidden, inner, words, keys, queries, heads, tied)


def of_skeleton(folder: Path) -> Shape:
    """The shape of any causal LM on disk, its parameters counted on the meta device: no weight is read.

    Raises:
        UserError: transformers cannot make a model of its config.json.
    """
    from dataclasses import replace

    from models.base.loading import skeleton

    model = skeleton(folder)
    own = getattr(model.config, "text_config", None) or model.config
    heads = own.num_attention_heads
    head = getattr(own, "head_dim", None) or own.hidden_size // heads
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tied = output is None or output.weight is embedding.weight
    shape = _usual(1e9)
    return replace(shape, parameters=parameters, layers=own.num_hidden_layers, hidden=own.hidden_size,
                   intermediate=getattr(own, "intermediate_size", None) or 4 * own.hidden_size,
                   vocabulary=embedding.weight.shape[0], queries=heads * head, heads=heads, tied=tied,
                   keys=(getattr(own, "num_key_value_heads", None) or heads) * head)
