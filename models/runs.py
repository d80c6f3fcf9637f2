"""A trained run, whatever it is, as a model that answers: the one place that knows every kind of run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from data.prompts import Template, template
from models.adapters.mixture import load_mix
from models.base.loading import base_path, check_base, load_base, load_tokenizer, settled
from models.base.placement import set_up_torch
from models.moe.files import load_moe
from models.run_folders import ADAPTER, MOE, parts_of, run_folder


@dataclass
class Loaded:
    """A model ready to answer, with its tokenizer and template; ``name`` is the run's, "base" for the base itself."""

    model: PreTrainedModel
    tokenizer: Any
    template: Template
    name: str
    device: torch.device


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
        base = base_path(args.model_name_or_path, args.cache_dir)
        return _loaded(load_mix(args.results, parts, base, dtype, device), base, args, run, device)
    # commands without --checkpoint_number ask for the finished run
    folder = run_folder(args.results, run, getattr(args, "checkpoint_number", -1))
    # a folder is what the file in it says: of a full model neither is there
    if (folder / MOE).is_file():
        model = load_moe(folder, args, dtype, device)
    elif (folder / ADAPTER).is_file():
        model = _load_adapter(folder, args, dtype, device)
    else:
        model = load_base(folder, dtype, device)
    return _loaded(model, folder, args, run, device)


def _load_adapter(folder: Path, args: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    base = base_path(args.model_name_or_path, args.cache_dir)
    check_base(folder, base)
    # merged in fp32 where there is room for it: a device that holds the 16-bit model may not hold twice that
    model = PeftModel.from_pretrained(load_base(base, torch.float32, torch.device("cpu")), folder, use_safetensors=True)
    return settled(model.merge_and_unload(), dtype, device)


def _loaded(model: PreTrainedModel, folder: Path, args: Any, name: str, device: torch.device) -> Loaded:
    # an adapter may have been saved without one; then it speaks its base's
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base_path(args.model_name_or_path, args.cache_dir))
    return Loaded(model, tokenizer, template(args.template, tokenizer), name, device)
