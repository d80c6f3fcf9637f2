"""A frozen base in 8 or 4 bits under a LoRA that trains (bitsandbytes): the published adapters' int8, and QLoRA's nf4.

The adapter itself stays fp32, and what is written is an ordinary adapter of the base: answers, fusion and merging use the
base as it lies on disk.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from errors import UserError
from models.base import attention
from models.base.loading import read_weights, skeleton

#: Kind -> the lowest CUDA compute capability that bitsandbytes multiplies it on.
CAPABILITY = {"int8": (7, 5), "nf4": (6, 0)}
#: Weights that share a scale in 4 bits, bitsandbytes' default.
_BLOCK = 64


def check(kind: str, device: torch.device) -> None:
    """A UserError where this machine cannot hold a base so; reads no weights."""
    flag = f"--base_quantization {kind}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag}: the package bitsandbytes is not installed; pip install -r requirements.txt, or leave the "
                        "flag out")
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # its native library lacks, or fits no CUDA that is here
        raise UserError(f"{flag}: bitsandbytes does not load here ({type(error).__name__}: {error}); install it anew with "
                        "pip install -r requirements.txt, or leave the flag out") from None
    # older releases have no such list and know CUDA alone
    if device.type not in getattr(bitsandbytes, "supported_torch_devices", ("cuda",)):
        raise UserError(f"{flag}: bitsandbytes {bitsandbytes.__version__} does not compute on {device.type}; use --device "
                        "cuda, or leave the flag out")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability()) < CAPABILITY[kind]:
        raise UserError(f"{flag}: needs CUDA compute capability {'.'.join(map(str, CAPABILITY[kind]))}, this device has "
                        f"{'.'.join(map(str, found))}; use --device cpu, or leave the flag out")


def load_quantised(folder: Path, kind: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal LM whose linear layers but the output head are held in ``kind``, ready for a LoRA on it.

    The rest (embeddings, norms, head) is fp32, the base is frozen, gradient checkpointing is on.

    Args:
        dtype: of the 4-bit layers' products; LLM.int8 multiplies in 8 bits, outliers in half precision.

    Raises:
        UserError: see ``check``; or the model's layers cannot be held in 4 bits on a CPU.
    """
    check(kind, device)
    if kind == "nf4" and device.type == "cpu":
        _check_widths(folder)
    # double quantisation: the blocks' scales are themselves held in 8 bits (QLoRA, Dettmers et al. 2023)
    how = (BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else
           BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=True))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    where = torch.cuda.current_device() if device.type == "cuda" else device.type
    model = read_weights(folder, quantization_config=how, dtype=dtype, device_map={"": where},
                         attn_implementation=attention.implementation_for(config, device))
    # keys and values that nobody reads again, and that gradient checkpointing cannot have
    model.config.use_cache = False
    if device.type == "cpu":
        for module in model.modules():
            # bitsandbytes would repack a layer at its first evaluation, for good, in a layout that passes no gradient back
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    # the reentrant form wants inputs with a gradient, which frozen embeddings have not
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def whole_weight(linear: torch.nn.Module) -> Tensor:
    """(out, in): a layer's weight as it multiplies, whatever bits it is held in."""
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, state)
    # int8: rows by their largest entry over 127; the first pass moves these from the weight to the layer
    scales = getattr(linear.weight, "SCB", None)
    scales = getattr(getattr(linear, "state", None), "SCB", None) if scales is None else scales
    return linear.weight.data if scales is None else linear.weight.data * (scales / 127)[:, None]


def _check_widths(folder: Path) -> None:
    """bitsandbytes 0.50.2 reads 4-bit rows on a CPU block by block from each row's start: rows that are no whole number of
    blocks come out wrong (a relative error of 0.3 instead of 0.09), without a word."""
    # shapes alone, without weights: the check takes no memory
    empty = skeleton(folder)
    # the head is not quantised
    head = empty.get_output_embeddings()
    wrong = [f"{name} ({module.in_features})" for name, module in empty.named_modules()
             if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % _BLOCK]
    if wrong:
        raise UserError(f"--base_quantization nf4: on a CPU bitsandbytes reads rows right only where they are a multiple of "
                        f"{_BLOCK} wide, and {len(wrong)} layers are not, e.g. {wrong[0]}; use int8, or --device cuda")
