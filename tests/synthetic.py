"""Checkpoints of any size without a model: random tensors under a Llama's names, from a seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_checkpoint(folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 16, ffn: int = 40, vocab: int = 50,
                    dtype: torch.dtype = torch.bfloat16, base: Path | None = None, head: bool = True, shards: int = 1,
                    scale: float = 0.02) -> Path:
    """A Llama-shaped checkpoint; with ``base``, that one plus small noise, as fine-tuning leaves it."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = shape
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    old = read_all(base) if base else {}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator) * scale
        tensors[name] = ((old[name].float() if name in old else torch.zeros(shape)) + noise).to(dtype)
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else \
        [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
              "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocab,
              "tie_word_embeddings": not head, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_tokenizer(folder: Path, pieces: list[str], added: list[str] = ()) -> None:
    """A tokenizer.json with these pieces, numbered in order, and added tokens behind them."""
    extra = [{"id": len(pieces) + i, "content": text, "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False} for i, text in enumerate(added)]
    content = {"version": "1.0", "added_tokens": extra, "model": {
        "type": "WordLevel", "vocab": {text: i for i, text in enumerate(pieces)}, "unk_token": pieces[0]}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors package."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def merge_flags(folder: Path, method: str = "ties", parameters: str = "density=0.3", models: str = "abc") -> list[str]:
    """The flags that merge models of ``folder`` (names, or letters), with its base where the method takes one."""
    from models.merging.methods import METHODS

    words = ["--method", method, "--models", ",".join(str(folder / m) for m in models), "--parameters", parameters]
    return words if METHODS[method].base == "no" else [*words, "--base_model", str(folder / "base")]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}
