"""A trained run, whatever it is, as a model that answers: the one place that knows every kind of run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data.prompts import Template, template
from models.adapters.apply import add_to, check_fit
from models.adapters.files import read_adapter
from models.adapters.mixture import load_mix
from models.base.folders import check_folder
from models.base.loading import base_path, check_base, load_base, load_tokenizer, settled, skeleton
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
    # commands without --checkpoint_number ask for the finished run
    parts = parts_of(run) if run else ()
    folder = run_folder(args.results, run, getattr(args, "checkpoint_number", -1)) if run and not parts else None
    # a folder is what the file in it says: of a full model neither is there
    if folder and not any((folder / name).is_file() for name in (MOE, ADAPTER)):
        check_folder(folder, f"run '{run}'")
        base = folder
    else:
        base = base_path(args.model_name_or_path, args.cache_dir)
    # before the weights: what is wrong with it shows at once
    tokenizer = _tokenizer(folder, base)
    shape = template(args.template, tokenizer)
    if folder and (folder / MOE).is_file():
        model = load_moe(folder, args, dtype, device)
    elif folder and base != folder:
        model = _load_adapter(folder, args, dtype, device)
    else:
        model = load_mix(args.results, parts, base, dtype, device) if parts else load_base(base, dtype, device)
    return Loaded(model, tokenizer, shape, run or "base", device)


def load_adapter(folder: Path, base: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base with an adapter in its weights.

    Raises:
        UserError: it is no plain LoRA, was trained on another base, or a part of it fits nowhere.
    """
    # unscaled: the scale is applied where PEFT applies it
    adapter = read_adapter(folder, scaled=False)
    check_base(folder, base)
    check_fit([adapter], skeleton(base))
    # merged in fp32 where there is room for it: a device that holds the 16-bit model may not hold twice that
    model = load_base(base, torch.float32, torch.device("cpu"))
    add_to(model, adapter.modules, adapter.scales)
    return settled(model, dtype, device)


def _load_adapter(folder: Path, args: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    return load_adapter(folder, base_path(args.model_name_or_path, args.cache_dir), dtype, device)


def _tokenizer(folder: Path | None, base: Path) -> Any:
    # an adapter may have been saved without one; then it speaks its base's
    own = folder is not None and (folder / "tokenizer_config.json").is_file()
    return load_tokenizer(folder if own else base, base)
