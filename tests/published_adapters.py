"""Adapters of the published shape (Llama-2-7B, r 8, alpha 32, q and v) on disk, and what vLLM wants of an adapter."""

from __future__ import annotations

import json
import re

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.adapters.files import CONFIG, WEIGHTS

TARGETS = ("q_proj", "v_proj")


def published_shape(folder, seed, layers=32, hidden=4096):
    """An adapter file of the published shape with the published configuration; no base model."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, 8, generator=generator) * 0.01
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "r": 8,
        "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "target_modules": list(TARGETS)}))


def passes_vllm(folder, max_rank):
    """What vllm/lora/peft_helper.py and lora_model.py check: rank, flags, and nothing but lora_A and lora_B."""
    found = json.loads((folder / CONFIG).read_text())
    assert found["r"] <= max_rank
    assert found["lora_alpha"] == found["r"]
    assert not found["modules_to_save"]
    assert not found["use_dora"]
    assert not found["use_rslora"]
    assert found["bias"] == "none"
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", name) for name in names)
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert {name.split(".")[-3] for name in names} == set(found["target_modules"])
