"""The fused MoE on disk and in memory: install the layers in a base model, save, load.

A fused model is a folder with ``moe.safetensors`` (routers and expert factors, fp32), ``moe_config.json`` (experts,
top-k, ranks, base and provenance) and the tokenizer. The base is referenced by name and fingerprint, never copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from errors import UserError
from manifest import is_main, write_json
from models.adapters.resident import ResidentBase
from models.base import spread
from models.base.families import decoder_layers, family_of
from models.base.loading import base_path, load_base, skeleton
from models.base.parted import whole
from models.base.quantised import load_quantised
from models.checkpoints.fingerprints import fingerprint_like, same_base
from models.moe.layer import PROJECTIONS, SharedMoe, TuningConfig, halves
from models.moe.packed import PackedMoe, pack
from models.operators.low_rank import Pair

WEIGHTS, CONFIG = "moe.safetensors", "moe_config.json"
#: Version of the two files together; a reader refuses every other.
FORMAT = 1
#: What names of attention's LoRA tensors begin with, beside layers.{i}. of routers and experts.
_ATTENTION = "attention."


@dataclass(frozen=True)
class MoeConfig:
    """What ``moe_config.json`` holds beside the weights.

    Args:
        experts: names of the experts, in objective order.
        top_k: experts per token.
        base, base_fingerprint: the shared base, by name and by hash.
        sources: expert name -> SHA-256 of its adapter file.
        tuning: second-stage LoRA on the experts, None in a raw MoE.
        attention: second-stage LoRA on attention ({r, alpha, dropout}), None without.
    """

    experts: tuple[str, ...]
    top_k: int
    base: str
    base_fingerprint: str
    sources: dict[str, str]
    tuning: TuningConfig | None = None
    attention: TuningConfig | None = None


def moe_layers(model: torch.nn.Module) -> list[SharedMoe | PackedMoe]:
    """The fused layers of a model, first to last; those of ``load_moe`` are packed."""
    return [module for module in model.modules() if isinstance(module, (SharedMoe, PackedMoe))]


def install(model: PreTrainedModel, factors: list[dict[str, tuple[Tensor, Tensor]]], routers: list[Tensor],
            top_k: int) -> PreTrainedModel:
    """Replace every FFN of a base model by a ``SharedMoe`` around that same FFN.

    Args:
        factors: per layer, projection -> (a (E, r, in), b (E, out, r)), LoRA scale applied to b.
        routers: per layer (E, hidden).

    Returns:
        the same model, changed in place: its attention, norms and embeddings are the base's own tensors.
    """
    family = family_of(model.config)
    for layer, layer_factors, router in zip(decoder_layers(model, family), factors, routers, strict=True):
        ffn = getattr(layer, family.ffn)
        moe = SharedMoe(*family.ffn_parts(partial(getattr, ffn), halves), getattr(ffn, family.activation), layer_factors,
                        router, top_k)
        # where its layer is: a model may be spread over several devices
        setattr(layer, family.ffn, moe.to(next(ffn.parameters()).device))
    return model


def add_tuning(model: PreTrainedModel, experts: TuningConfig | None, attention: TuningConfig | None,
               seed: int) -> None:
    """Second-stage LoRA on every expert and on attention; the function is unchanged until the first step."""
    generator = torch.Generator().manual_seed(seed)
    if experts:
        for moe in moe_layers(model):
            moe.add_tuning(experts, generator)
    if attention:
        # PEFT draws from the global generator; the caller's stream goes on as if nothing had been drawn
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(_attention_config(model, attention), model)


def save_moe(folder: Path, model: PreTrainedModel, config: MoeConfig) -> None:
    """Write routers, experts, attention LoRA and configuration into ``folder``; every process must ask, the first writes."""
    # fp32 whatever the run computed in: a step of the optimiser is smaller than bfloat16 can tell
    tensors = {name: whole(tensor).detach().to("cpu", torch.float32).contiguous() for name, tensor in _saved_tensors(model)}
    if not is_main():
        return
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # last, so that a folder with a configuration is whole
    write_json(folder / CONFIG, {"format": FORMAT, **asdict(config)})


def read_config(folder: Path) -> MoeConfig:
    """The configuration of a saved MoE; a UserError when the folder holds none or a newer format."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no fused model here ({CONFIG} is missing); build one with models/llama_moe.py")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); build the fused model again") from None
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: format is not {FORMAT}; build the fused model again with models/llama_moe.py")
    content["experts"] = tuple(content["experts"])
    for name in ("tuning", "attention"):
        content[name] = TuningConfig(**content[name]) if content[name] else None
    return MoeConfig(**content)


def assemble(folder: Path, args: Any, dtype: torch.dtype, device: torch.device, *,
             top_k: int | None = None, bits: str | None = None) -> tuple[PreTrainedModel, MoeConfig]:
    """Base model with the saved fused layers in it, factors in fp32, nothing folded: for training and tests.

    Args:
        bits: hold the frozen base in int8 or nf4 (``models/base/quantised.py``).

    Raises:
        UserError: the base differs from the recorded one, top-k exceeds the experts, or tensors do not match.
    """
    config, base, tensors = _opened(folder, args, top_k)
    if bits and (family := family_of(skeleton(base).config)).gate == family.up:
        raise UserError(f"--base_quantization {bits}: gate and up are one matrix in this model ({family.gate}), which "
                        "cannot be parted in few bits; leave the flag out")
    model = load_quantised(base, bits, dtype, device) if bits else load_base(base, dtype, device)
    _fill(folder, model, config, tensors, top_k or config.top_k)
    return model, config


def load_moe(folder: Path, args: Any, dtype: torch.dtype, device: torch.device, *, packed: bool = True) -> PreTrainedModel:
    """A fused model for inference: attention LoRA merged in fp32, expert factors folded into the compute dtype.

    The base is loaded in the compute dtype, where it answers; no copy of it stands anywhere in fp32.

    Args:
        packed: layers as ``PackedMoe``, which answer at about the cost of one dense FFN; else as they train.
    """
    config, base, tensors = _opened(folder, args, None)
    resident = ResidentBase(base, dtype, device, spread.wanted(args))
    if config.attention:
        pairs = _attention_pairs(folder, tensors)
        model = resident.changed(pairs, dict.fromkeys(pairs, config.attention.scale))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ATTENTION)}
    else:
        model = resident.plain()
    _fill(folder, model, replace(config, attention=None), tensors, config.top_k)
    for moe in moe_layers(model):
        for factors in moe.experts.values():
            factors.fold_(dtype)
    if packed:
        pack(model)
    return model.eval()


def _opened(folder: Path, args: Any, top_k: int | None) -> tuple[MoeConfig, Path, dict[str, Tensor]]:
    """Configuration, base and tensors of a saved MoE, held against what the command says."""
    config = read_config(folder)
    if top_k is not None and not 1 <= top_k <= len(config.experts):
        raise UserError(f"--expert_topk {top_k}: {folder.name} has {len(config.experts)} experts; "
                        f"allowed: 1 to {len(config.experts)}")
    base = base_path(args.model_name_or_path, args.cache_dir)
    if not same_base(config.base_fingerprint, base):
        have = fingerprint_like(config.base_fingerprint, base)
        raise UserError(f"{folder}: was fused on base {config.base} (fingerprint {config.base_fingerprint[:12]}), "
                        f"but --model_name_or_path {args.model_name_or_path} has {have[:12]}; give that base")
    return config, base, _read_tensors(folder / WEIGHTS)


def _fill(folder: Path, model: PreTrainedModel, config: MoeConfig, tensors: dict[str, Tensor], top_k: int) -> None:
    """Put the saved layers into their base."""
    layers = range(model.config.num_hidden_layers)
    try:
        factors = [{name: (tensors[f"layers.{i}.{name}.a"], tensors[f"layers.{i}.{name}.b"]) for name in PROJECTIONS}
                   for i in layers]
        routers = [tensors[f"layers.{i}.router"] for i in layers]
    except KeyError as error:
        raise UserError(f"{folder / WEIGHTS}: tensor {error} is missing; build the fused model again") from None
    _check_shapes(folder / WEIGHTS, model, factors, routers, len(config.experts))
    install(model, factors, routers, top_k)
    # the seed is of no consequence: every tensor that it draws is read from the file next
    add_tuning(model, config.tuning, config.attention, seed=0)
    _load_trained(folder, model, tensors)


def _attention_pairs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Pair]:
    """Module -> (A, B) of the second stage's LoRA on attention."""
    a, b = ({name.removeprefix(_ATTENTION).removesuffix(end): tensor for name, tensor in tensors.items()
             if name.startswith(_ATTENTION) and name.endswith(end)} for end in (".lora_A.weight", ".lora_B.weight"))
    if not a or a.keys() != b.keys() or len(a) + len(b) != sum(name.startswith(_ATTENTION) for name in tensors):
        raise UserError(f"{folder / WEIGHTS}: does not match {CONFIG}: its LoRA on attention is not whole; build it again")
    return {module: (a[module], b[module]) for module in a}


def _saved_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that a fused model does not share with its base; the live tensors themselves."""
    for i, moe in enumerate(moe_layers(model)):
        yield f"layers.{i}.router", moe.router
        for name in PROJECTIONS:
            factors = moe.experts[name]
            for part in ("a", "b", "tuned_a", "tuned_b"):
                if getattr(factors, part) is not None:
                    yield f"layers.{i}.{name}.{part}", getattr(factors, part)
    if hasattr(model, "peft_config"):
        for name, tensor in get_peft_model_state_dict(model).items():
            yield _ATTENTION + name, tensor


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); build the fused model again") from None


def _check_shapes(path: Path, model: PreTrainedModel, factors: list[dict[str, tuple[Tensor, Tensor]]],
                  routers: list[Tensor], experts: int) -> None:
    """Every tensor against the base and the number of experts; a UserError names the first that differs."""
    hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
    sizes = {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}  # (in, out)
    for i, (layer, router) in enumerate(zip(factors, routers, strict=True)):
        wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [(f"layers.{i}.router", router, (experts, hidden))]
        for name, (a, b) in layer.items():
            # the rank is free: each of the two factors is held to the other's
            wanted += [(f"layers.{i}.{name}.a", a, (experts, b.shape[-1], sizes[name][0])),
                       (f"layers.{i}.{name}.b", b, (experts, sizes[name][1], a.shape[1]))]
        for name, tensor, shape in wanted:
            if tuple(tensor.shape) != shape:
                raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, needs {shape}; "
                                "build the fused model again")


@torch.no_grad()
def _load_trained(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Copy the second stage's tensors into the model; ``install`` has put routers and aligned factors there."""
    targets = dict(_saved_tensors(model))
    if set(targets) != set(tensors):
        odd = sorted(set(targets) ^ set(tensors))[:5]
        raise UserError(f"{folder / WEIGHTS}: does not match {CONFIG}, e.g. {', '.join(odd)}; build it again")
    for name, tensor in tensors.items():
        if name.startswith("layers.") and "tuned_" in name:
            targets[name].copy_(tensor)
    # PEFT renames its tensors on the way in and out, so that copying by our names would miss them
    attention = {name.removeprefix(_ATTENTION): tensor for name, tensor in tensors.items() if name.startswith(_ATTENTION)}
    if attention:
        set_peft_model_state_dict(model, attention)


def _attention_config(model: PreTrainedModel, attention: TuningConfig) -> LoraConfig:
    return LoraConfig(r=attention.r, lora_alpha=attention.alpha, lora_dropout=attention.dropout,
                      target_modules=list(family_of(model.config).attention), bias="none")
