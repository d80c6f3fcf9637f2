"""The table of layouts that hold a fused MoE: which families fit, what their tensors are called, what config.json says.

A family fits where the layout's own code computes the same function: softmax over all experts, the top k of it, divided by
their sum (``models.moe.router.route``), is Mixtral's rule, and Qwen3-MoE's with ``norm_topk_prob``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.checkpoints.configs import filled_known
from models.export.sources import Source

#: What every decoder's configuration has, by the names of transformers.
_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
           "attention_dropout", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
#: Why a family has no such layout, where there is more to say than that nobody has one.
_REASONS = {
    "gemma": "its FFN has GELU, where these layouts have SiLU", "gemma2": "its FFN has GELU, where these layouts have SiLU",
    "gemma3_text": "its FFN has GELU, where these layouts have SiLU",
    "qwen2": "its attention has biases, and Qwen2-MoE wants a shared expert beside the others",
    "olmo2": "its norms stand behind attention and FFN", "granite": "it multiplies embeddings, residuals and logits",
    "smollm3": "some of its layers have no rotary positions", "cohere": "attention and FFN read the same norm",
    "cohere2": "attention and FFN read the same norm", "phi3": "it keeps queries, keys and values in one matrix",
}


@dataclass(frozen=True)
class MoeLayout:
    """How a model of experts lies on disk.

    Args:
        name: of the layout.
        families: model types that compute the same function in it.
        router, expert: name of a layer's router; of an expert's projection, by layer, expert and part.
        parts: what the layout calls gate, up, down.
        config: (the base's configuration object, experts, experts per token) -> what config.json has beside the shared part.
        misfits: settings of these families that the layout has no place for.
    """

    name: str
    families: tuple[str, ...]
    router: str
    expert: str
    parts: Mapping[str, str]
    config: Callable[[Any, int, int], dict[str, Any]]
    misfits: Callable[[Any], list[str]]


def _mixtral(known: Any, experts: int, top_k: int) -> dict[str, Any]:
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
            "num_experts_per_tok": top_k, "sliding_window": getattr(known, "sliding_window", None),
            "router_jitter_noise": 0.0, "router_aux_loss_coef": 0.0, "output_router_logits": False}


def _mixtral_misfits(known: Any) -> list[str]:
    return [f"{name} is true, and Mixtral's layers have no biases" for name in ("attention_bias", "mlp_bias")
            if getattr(known, name, False)]


def _qwen3(known: Any, experts: int, top_k: int) -> dict[str, Any]:
    windows = set(known.layer_types or ()) == {"sliding_attention"}
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
            "num_experts_per_tok": top_k, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "moe_intermediate_size": known.intermediate_size, "attention_bias": known.attention_bias,
            "use_sliding_window": windows, "sliding_window": known.sliding_window if windows else None,
            "router_aux_loss_coef": 0.0, "output_router_logits": False}


def _qwen3_misfits(known: Any) -> list[str]:
    return ["only some of its layers have a sliding window, and Qwen3-MoE's have all or none"] \
        if len(set(known.layer_types or ())) > 1 else []


LAYOUTS: dict[str, MoeLayout] = {
    "mixtral": MoeLayout("mixtral", ("llama", "mistral"), "model.layers.{layer}.block_sparse_moe.gate.weight",
                         "model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight",
                         {"gate": "w1", "up": "w3", "down": "w2"}, _mixtral, _mixtral_misfits),
    "qwen3_moe": MoeLayout("qwen3_moe", ("qwen3",), "model.layers.{layer}.mlp.gate.weight",
                           "model.layers.{layer}.mlp.experts.{expert}.{part}.weight",
                           {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, _qwen3, _qwen3_misfits),
}


def problems(layout: MoeLayout, source: Source) -> list[str]:
    """What keeps a source from being written in a layout; each sentence says what to do instead."""
    flag = f"--layout {layout.name}"
    if source.moe is None:
        return [f"{flag}: {source.name} is no fused MoE; write it as a plain model with --layout dense, or fuse adapters "
                "into one with models/llama_moe.py"]
    instead = ("write each expert as an adapter (--layout peft), one of them or their average as a plain model "
               "(--layout dense with --merge_expert NAME or --average), or let the run answer with inference.py")
    if source.kind not in layout.families:
        fitting = next((row.name for row in LAYOUTS.values() if source.kind in row.families), "")
        why = _REASONS.get(source.kind, "")
        return [f"{flag}: is for {' and '.join(layout.families)}; {source.name} is a {source.kind}"
                + (f": {why}" if why and not fitting else "") + "; "
                + (f"give --layout {fitting}" if fitting else f"no layout of experts computes the same; {instead}")]
    known = filled_known(source.config)
    found = layout.misfits(known)
    if (act := getattr(known, "hidden_act", None)) != "silu":
        found.append(f"hidden_act is {act}, where the layout has silu")
    return [f"{flag}: {source.name}: {problem}; {instead}" for problem in found]


def moe_config(layout: MoeLayout, source: Source, dtype: str | None) -> dict[str, Any]:
    """config.json of a fused MoE in a layout; ``dtype`` of the weights, None: of several types."""
    return moe_settings(layout, source, len(source.experts), source.required_moe.top_k, dtype)


def moe_settings(layout: MoeLayout, source: Source, experts: int, top_k: int, dtype: str | None) -> dict[str, Any]:
    """config.json of so many experts on a source's base, so many of them per token."""
    known = filled_known(source.config)
    made = {key: getattr(known, key) for key in _SHARED if hasattr(known, key)}
    rope = dict(known.rope_parameters)
    kind = rope.get("rope_type", "default")
    heads = known.num_attention_heads
    made |= {
        "head_dim": getattr(known, "head_dim", None) or known.hidden_size // heads,
        "tie_word_embeddings": not any(name.endswith("lm_head.weight") for name in source.tensors),
        # as transformers 5 keeps it, and as readers of earlier configurations look for it
        "rope_parameters": rope, "rope_theta": rope["rope_theta"],
        **({} if kind == "default" else {"rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}),
        **({"dtype": dtype} if dtype else {}),
    }
    return made | layout.config(known, experts, top_k)
