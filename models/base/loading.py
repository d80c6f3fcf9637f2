"""Base models: found, checked, loaded.

Only safetensors weights are read and remote code is never executed. Embeddings are never resized: a tokenizer without
a pad token pads with its end token, which is harmless because masks and labels are built from lengths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from errors import UserError
from models.base import attention
from models.checkpoints.fingerprints import fingerprint
from models.run_folders import ADAPTER


def base_path(name: str, cache_dir: str | None = None, flag: str = "") -> Path:
    """The local folder of a base model: the embedded one, a given folder, or a hub name's snapshot.

    Args:
        flag: how the user named it, for messages; empty: with --model_name_or_path.

    Raises:
        UserError: the folder is no model; the hub cannot be reached and its cache does not hold the model.
    """
    # imported here: data lies below models, and a base on disk needs none of it
    if name == "embedded":
        from data.gguf_model import embedded_model_dir

        return embedded_model_dir()
    flag = flag or f"--model_name_or_path {name}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise UserError(f"{flag}: needs config.json and *.safetensors in this folder")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag}: no such folder; give 'embedded', a folder, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        # no *.bin and no *.py: neither pickles nor remote code reach this machine
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types; the user needs one sentence
        raise UserError(
            f"{flag}: neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); allowed: 'embedded', a local folder, a hub name that this machine can reach "
            "(gated models need HF_TOKEN in the environment)"
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # not a new token: it would need a row of its own in embeddings that are never resized
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal LM in evaluation mode; its generation settings are reset so that every model decodes alike."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True,
                                                 attn_implementation=attention.implementation(device))
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model.to(device).eval()


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters only: ``model.to`` would also round RoPE's inverse frequencies, which must stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def settled(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model that was put together on the CPU, cast and moved to where it answers."""
    cast_parameters(model, dtype).to(device)
    # it was put together with the CPU's attention
    if device.type != "cpu":
        model.set_attn_implementation(attention.implementation(device))
    return model.eval()


def check_base(folder: Path, base: Path) -> str:
    """The fingerprint of ``base`` if the adapter in ``folder`` was trained on it.

    Raises:
        UserError: it was trained on another base, or nothing tells which.
    """
    manifest = folder / "manifest.json"
    want = json.loads(manifest.read_text()).get("inputs", {}).get("base") if manifest.is_file() else None
    if want is None:
        named = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path") or ""
        # a hub name says which base was meant, not which weights were used
        if not Path(named).is_dir():
            raise UserError(
                f"{folder}: has no manifest.json with the fingerprint of its base, and its base_model_name_or_path "
                f"'{named}' is no local folder; train it with align_basemodel.py, or point that entry at the base"
            )
        want = fingerprint(Path(named))
    have = fingerprint(base)
    if want != have:
        raise UserError(
            f"{folder}: was trained on another base (fingerprint {want[:12]}, but {base} has {have[:12]}); "
            "give its base with --model_name_or_path, or train the adapter again on this one"
        )
    return have
