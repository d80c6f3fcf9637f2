"""A pico model of every family, each with the settings that tell it from a Llama: windows, caps, scales, norms, biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pico import pico_tokenizer

SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2}
#: Shorter than the prompts of these tests, so that it matters.
WINDOW = {"sliding_window": 16}
_BY_LAYER = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
#: What differs from the first layer to the last, or from transformers' default, by family.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "gemma": {},
    "gemma2": _BY_LAYER | _CAPS,
    "gemma3_text": _BY_LAYER | _CAPS | {"attn_logit_softcapping": None},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": _BY_LAYER | {"logit_scale": 0.25},
    "phi3": WINDOW,
    # mixtures, as models/fuse.py export writes them
    "mixtral": WINDOW | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": WINDOW | {"use_sliding_window": True, "num_experts": 3, "num_experts_per_tok": 2,
                           "moe_intermediate_size": 64},
    # of no known family
    "gpt2": {}, "gpt_neox": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


def make_family(folder: Path, kind: str, seed: int = 0, **settings: Any) -> Path:
    """Save a random model of a family (hidden 32, two layers, fp32) with the pico tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = pico_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | ids | SETTINGS[kind] | settings)))
        # norms and biases start at one and zero, where leaving them out would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_in(folder: Path) -> dict[str, Any]:
    """The model's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
