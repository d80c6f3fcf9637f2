"""What a folder is, when it is no plain checkpoint: quantised or packed weights, an adapter, a mask, a fused MoE, GGUF.

Codes of a quantised weight are numbers too: averaged, or copied beside averaged scales, they give a file that loads and a
model that is neither input. Both the configuration and the tensors are asked, for either may be silent. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.header import TensorInfo, shown

#: quant_method of a quantization_config -> what people call it.
_METHODS = {"fp8": "FP8", "fbgemm_fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes",
            "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "hqq": "HQQ", "eetq": "EETQ", "quanto": "Quanto",
            "aqlm": "AQLM", "torchao": "torchao", "bitnet": "BitNet", "vptq": "VPTQ", "higgs": "HIGGS", "spqr": "SpQR",
            "modelopt": "ModelOpt", "quark": "Quark", "auto-round": "AutoRound", "intel/auto-round": "AutoRound"}
#: End of a tensor's name -> what keeps such a tensor beside or instead of a weight. Sought in this order.
_PARTS = tuple((re.compile(pattern), what) for pattern, what in (
    (r"\.quant_state\.bitsandbytes__\w+$|\.weight\.(nested_)?(absmax|quant_map)$", "bitsandbytes 4-bit"),
    (r"\.SCB$|\.weight_format$", "bitsandbytes int8"),
    (r"\.g_idx$", "GPTQ"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    (r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$", "compressed-tensors"),
    (r"(\.|_)(weight|proj|experts\.\w+)_scale_inv$|_weight_scale_inv$", "FP8"),
    (r"_(proj|up|down|gate)_blocks$", "MXFP4"),
    (r"\.W_q$", "HQQ"),
    (r"\.weight_scales$", "EETQ"),
    (r"\.weight\._(data|scale|shift)$", "Quanto"),
    (r"\.(codebooks|codes)$", "AQLM"),
    (r"\.(centroids|res_centroids)$", "VPTQ"),
    (r"_weight_qdata$|\.weight_qdata$", "torchao"),
    (r"\.weight_scale(_2)?$|\.(input|output)_scale$", "scaled, of FP8 or int8,"),
))
_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHT = re.compile(r"(^|[._])weight$")
ADAPTER, MOE, MASK = "adapter_config.json", "moe_config.json", "mask.json"


def packed(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """What quantisation or packing the weights are in, and where that is seen; None for plain floating-point weights."""
    said = _declared(config)
    if (seen := _seen(tensors)) is None:
        return None if said is None else f"{said} by its config.json"
    what, info = seen
    return f"{said or what} (tensor {shown(info.name)}, {info.dtype}{', and its config.json' if said else ''})"


def _seen(tensors: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo] | None:
    """What the tensors show, with one that does: by the parts that a format keeps, by FP8, by weights that are no floats."""
    eights = next((info for info in tensors.values() if info.dtype.startswith("F8")), None)
    for pattern, what in _PARTS:
        if info := next((info for name, info in tensors.items() if pattern.search(name)), None):
            return ("FP8", eights) if eights else (what, info)
    if eights:
        return "FP8", eights
    # whatever it is called: weights of a model that can be added up are floating-point numbers
    return next(((f"{info.dtype} codes", info) for name, info in tensors.items()
                 if info.dtype not in _FLOATS and _WEIGHT.search(name)), None)


def packed_problem(folder: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """The sentence that refuses such weights; None for plain ones."""
    found = packed(tensors, config)
    if found is None:
        return None
    advice = "give the unquantised original, or dequantise it and save that (transformers: model.dequantize())"
    if found.endswith("by its config.json"):
        advice += "; if its tensors are plain, delete quantization_config from its config.json"
    return f"{folder}: its weights are quantised: {found}; codes and scales cannot be merged or subtracted; {advice}"


def other_kind(folder: Path) -> str | None:
    """What a path is instead of a checkpoint, and which command takes it; None when nothing says so."""
    if folder.suffix == ".gguf" or (folder.is_dir() and not any(folder.glob("*.safetensors"))
                                    and any(folder.glob("*.gguf"))):
        return (f"{folder}: holds GGUF, a format of quantised weights for llama.cpp; give the original's folder of "
                "safetensors, or convert it: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)"
                ".save_pretrained('NEW')")
    # such a folder may hold a checkpoint beside the adapter; merging that would leave the adapter out
    if (folder / ADAPTER).is_file() or (folder.name == "adapter_model.safetensors" and folder.is_file()):
        return (f"{folder}: holds a LoRA adapter, not a model; fuse it with models/fuse.py adapters, or write it into its "
                "base first: models/fuse.py export RUN --layout dense")
    if (folder / MOE).is_file():
        return (f"{folder}: holds a fused MoE (routers and experts on a base), not a model's weights; write "
                "an expert as a model (models/fuse.py export RUN --layout dense --merge_expert NAME), fuse its experts with "
                "models/fuse.py adapters, tune it with align_basemodel.py --moe_flag 1, or let it answer with inference.py")
    if (folder / MASK).is_file():
        return (f"{folder}: holds a trained mask, not a model; write the masked model with models/fuse.py realign "
                f"--method mask --mask {folder.name}, and merge that")
    return None


def _declared(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a configuration names, also of a model inside it (text_config)."""
    for key, value in config.items():
        if not isinstance(value, Mapping):
            continue
        if key in ("quantization_config", "compression_config"):
            method = str(value.get("quant_method") or ("compressed-tensors" if key == "compression_config" else "")).lower()
            bits = next((f" {n}-bit" for n in (4, 8) if value.get(f"load_in_{n}bit")), "")
            return f"{_METHODS.get(method, shown(method) if method else 'a quantization_config')}{bits}"
        if key.endswith("_config") and (inner := _declared(value)):
            return inner
    return None
