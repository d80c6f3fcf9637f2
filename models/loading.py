"""Base models, adapters and fused models: found, checked, loaded.

Only safetensors weights are read and remote code is never executed. Embeddings are never resized: a tokenizer without
a pad token pads with its end token, which is harmless because masks and labels are built from lengths.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from commands.mixture import Parts, mixture_parts
from data.prompts import Template, template
from errors import UserError
from models import attention
from models.checkpoint import fingerprint

log = logging.getLogger(__name__)
ADAPTER, MOE = "adapter_config.json", "moe_config.json"


@dataclass
class Loaded:
    """A model ready to answer, with its tokenizer and template."""

    model: PreTrainedModel
    tokenizer: Any
    template: Template
    name: str
    device: torch.device


def set_up_torch(args: Any) -> tuple[torch.device, torch.dtype]:
    """Threads, seed, device and compute dtype of a command; returns (device, dtype)."""
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(args.seed)
    hf_logging.disable_progress_bar()
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else
                          "cpu" if args.device == "auto" else args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or install the CUDA build of torch")
    return device, compute_dtype(args.dtype, device)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the hardware multiplies in it (AMX or AVX512-BF16 on a CPU), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    abilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else torch.float32


def base_path(name: str, cache_dir: str | None = None, said: str = "") -> Path:
    """The local folder of a base model: the embedded one, a given folder, or a hub name's snapshot.

    Args:
        said: how the user named it, for messages; empty: with --model_name_or_path.

    Raises:
        UserError: the folder is no model; the hub cannot be reached and its cache does not hold the model.
    """
    if name == "embedded":
        from data.gguf_model import embedded_model_dir

        return embedded_model_dir()
    said = said or f"--model_name_or_path {name}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise UserError(f"{said}: needs config.json and *.safetensors in this folder")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{said}: no such folder; give 'embedded', a folder, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types; the user needs one sentence
        raise UserError(
            f"{said}: neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); allowed: 'embedded', a local folder, a hub name that this machine can reach "
            "(gated models need HF_TOKEN in the environment)"
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
    if device.type != "cpu":
        model.set_attn_implementation(attention.implementation(device))
    return model.eval()


def run_folder(results: Path, run: str, checkpoint: int = -1) -> Path:
    """Where a trained run lies; a UserError lists the runs that exist."""
    if checkpoint >= 0:
        folder = results / "checkpoints" / run / f"checkpoint-{checkpoint}"
        if not folder.is_dir():
            there = sorted(p.name for p in folder.parent.glob("checkpoint-*"))
            raise UserError(f"--checkpoint_number {checkpoint}: {folder} does not exist; there: {there or 'none'}")
        if (same := results / "outputs" / f"{run}_{checkpoint}").is_dir():
            raise UserError(f"--checkpoint_number {checkpoint}: its answers and scores go to cross_{same.name}, and so do "
                            f"those of the run '{same.name}'; rename the folder {same} first")
        return folder
    folder = results / "outputs" / run
    if not any((folder / name).is_file() for name in (ADAPTER, MOE, "config.json")):
        there = sorted(p.name for p in (results / "outputs").glob("[!.]*")) if (results / "outputs").is_dir() else []
        raise UserError(
            f"run '{run}': nothing in {folder}; there: {', '.join(there) or 'none'}; "
            f"train it with align_basemodel.py (or models/llama_moe.py for {run if 'moe' in run else 'raw_moe'})"
        )
    return folder


def run_files(results: Path, run: str, checkpoint: int = -1) -> list[Path]:
    """The weight files of a run, or of every adapter of a weighted sum (``task@0.6_safety@0.4``), sorted.

    Raises:
        UserError: one of them does not exist; names all that lack.
    """
    files, problems = [], []
    for name in [name for name, _ in parts_of(run)] or [run]:
        try:
            files += sorted(run_folder(results, name, checkpoint).glob("*.safetensors"))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return files


def parts_of(run: str) -> Parts:
    """(run, weight) pairs of a weighted sum's name; empty for an ordinary run; a UserError for a malformed sum."""
    try:
        return mixture_parts(run)
    except ValueError as error:
        raise UserError(f"run '{run}': {error}") from None


def load_run(run: str, args: Any) -> Loaded:
    """Base model (run ""), adapter, fused MoE, full model, or weighted sum of adapters, for inference in the compute dtype.

    Adapters are merged in fp32 before the cast, so that bfloat16 rounds the sum once and not the small change.

    Raises:
        UserError: no such run, or it was trained on another base than the one given.
    """
    device, dtype = set_up_torch(args)
    if not run:
        folder = base_path(args.model_name_or_path, args.cache_dir)
        model = load_base(folder, dtype, device)
        return _loaded(model, folder, args, "base", device)
    if parts := parts_of(run):
        from models.adapter_mix import load_mix

        base = base_path(args.model_name_or_path, args.cache_dir)
        return _loaded(load_mix(args.results, parts, base, dtype, device), base, args, run, device)
    folder = run_folder(args.results, run, getattr(args, "checkpoint_number", -1))
    if (folder / MOE).is_file():
        from models.moe_files import load_moe

        model = load_moe(folder, args, dtype, device)
    elif (folder / ADAPTER).is_file():
        model = _load_adapter(folder, args, dtype, device)
    else:
        model = load_base(folder, dtype, device)
    return _loaded(model, folder, args, run, device)


def check_base(folder: Path, base: Path) -> str:
    """The fingerprint of ``base`` if the adapter in ``folder`` was trained on it.

    Raises:
        UserError: it was trained on another base, or nothing tells which.
    """
    manifest = folder / "manifest.json"
    want = json.loads(manifest.read_text()).get("inputs", {}).get("base") if manifest.is_file() else None
    if want is None:
        named = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path") or ""
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


def _load_adapter(folder: Path, args: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from peft import PeftModel

    base = base_path(args.model_name_or_path, args.cache_dir)
    check_base(folder, base)
    # merged in fp32 where there is room for it: a device that holds the 16-bit model may not hold twice that
    model = PeftModel.from_pretrained(load_base(base, torch.float32, torch.device("cpu")), folder, use_safetensors=True)
    return settled(model.merge_and_unload(), dtype, device)


def _loaded(model: PreTrainedModel, folder: Path, args: Any, name: str, device: torch.device) -> Loaded:
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base_path(args.model_name_or_path, args.cache_dir))
    return Loaded(model, tokenizer, template(args.template, tokenizer), name, device)
