"""How large a base model is: by its config.json, or by its name where it is one of those that the presets take."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers.

    Args:
        parameters: of the whole model.
        keys: width of all key heads of a layer together.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    keys: int

    def lora(self, rank: int, modules: tuple[str, ...]) -> int:
        """Numbers of a LoRA on these modules of every layer: rank x (width in + width out) each."""
        width = {"q_proj": 2 * self.hidden, "k_proj": self.hidden + self.keys, "v_proj": self.hidden + self.keys,
                 "o_proj": 2 * self.hidden, **dict.fromkeys(FFN, self.hidden + self.intermediate)}
        return self.layers * rank * sum(width.get(name, 2 * self.hidden) for name in modules)


FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_7B = Shape(6_738_415_616, 32, 4096, 11008, 32000, 4096)
#: Ends of names, lower case -> what they are; counted from their configurations.
_NAMED = {
    "embedded": (_SMOL := Shape(134_515_008, 30, 576, 1536, 49152, 192)), "smollm2-135m-instruct": _SMOL,
    "llama-2-7b-hf": _LLAMA_7B, "llama-2-7b-chat-hf": _LLAMA_7B, "wizardlm-7b-uncensored": _LLAMA_7B,
    "tinyllama-1.1b-chat-v1.0": Shape(1_100_048_384, 22, 2048, 5632, 32000, 256),
    "llama-2-13b-hf": (_LLAMA_13B := Shape(13_015_864_320, 40, 5120, 13824, 32000, 5120)), "llama-2-13b-chat-hf": _LLAMA_13B,
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
    return Shape(int(parameters), layers, hidden, 11 * hidden // 4, 32000, hidden)


def _of_folder(folder: Path) -> Shape | None:
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, layers = int(content["hidden_size"]), int(content["num_hidden_layers"])
        inner, words = int(content["intermediate_size"]), int(content["vocab_size"])
        heads = int(content["num_attention_heads"])
        head = int(content.get("head_dim") or hidden // heads)
        keys = int(content.get("num_key_value_heads") or heads) * head
    # no folder, or a model that is written down otherwise: the name may still tell
    except (OSError, ValueError, LookupError, TypeError):
        return None
    layer = 2 * hidden * heads * head + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    embeddings = hidden * words * (1 if content.get("tie_word_embeddings") else 2)
    return Shape(layers * layer + embeddings + hidden, layers, hidden, inner, words, keys)
