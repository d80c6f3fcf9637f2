"""A model's folder, looked at before anything heavy: files, headers and config.json, never the weights themselves.

Every command opens its base through ``models.base.loading.base_path``, which asks here: a shard that is missing, cut or a
Git LFS pointer, quantised or packed weights, a GGUF file, pickles, remote code and unknown architectures all end in a
sentence, in the time that it takes to read the headers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from errors import UserError
from models.checkpoints.header import TensorInfo
from models.checkpoints.kinds import ADAPTER
from models.checkpoints.kinds import packed as packed_kind
from models.checkpoints.reader import CONFIG, Checkpoint

#: What the folder is opened for: to run it as a language model, as a classifier (a judge), or for its tensors alone.
CAUSAL, CLASSIFIER, TENSORS = "language model", "classifier", "tensors"
#: How a file begins that Git LFS left in the place of the one that it stands for.
_POINTER = b"version https://git-lfs"
#: Ends of names that only quantised or packed weights have: (pattern, whose they are).
_PACKED = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ codes"), (r"\.weight_scale(_inv)?$|\.(weight|input)_scale$", "FP8 scales"),
    (r"\.(SCB|weight\.(absmax|quant_map|nested_absmax|quant_state\.\w+))$", "bitsandbytes' scales"),
    (r"\.weight_packed$", "compressed-tensors' codes"), (r"_(blocks|scales)$", "MXFP4 codes"),
)
_FULL = "give the full-precision model that it was made from, or dequantise it once: " \
        "AutoModelForCausalLM.from_pretrained(..).dequantize().save_pretrained('NEW')"


def check_folder(folder: Path, flag: str, use: str = CAUSAL) -> None:
    """Refuse a folder that could not be opened, or would be opened as something else than it is.

    Args:
        flag: how the user named it, for messages.
        use: ``CAUSAL``, ``CLASSIFIER`` or ``TENSORS``; the last asks nothing of the architecture.

    Raises:
        UserError: everything that is wrong with it.
    """
    if (ggufs := sorted(folder.glob("*.gguf"))) and not list(folder.glob("*.safetensors")):
        raise UserError(f"{flag}: {gguf_advice(ggufs[0])}")
    path = folder / CONFIG
    pickled = any(any(folder.glob(f"*{suffix}")) for suffix in (".bin", ".pt", ".pth"))
    if not path.is_file() or not (any(folder.glob("*.safetensors")) or pickled):
        raise UserError(f"{flag}: needs {CONFIG} and *.safetensors in this folder")
    problems: list[str] = []
    config = read_config(path, problems)
    tensors: dict[str, TensorInfo] = {}
    try:
        with Checkpoint.open(folder) as checkpoint:
            tensors = checkpoint.tensors
    except UserError as error:
        problems += [f"{flag}: {problem}" for problem in _one_a_file(error.problems) if not problem.startswith(str(path))]
    if use != TENSORS:
        # transformers would load the adapter's base, whatever lies here, and put the adapter on it
        if (folder / ADAPTER).is_file():
            problems.append(f"{flag}: holds an adapter ({ADAPTER}) beside a model's weights, and transformers would open "
                            "the adapter's base in their place; move the adapter's files into a folder of their own")
        problems += [f"{flag}: {problem}" for problem in _ends_problems(folder)]
    quantised = quantisation(config) or packed(tensors.values()) or packed_kind(tensors, {})
    if quantised:
        problems.append(f"{flag}: its weights are quantised ({quantised}), which is not read; {_FULL}")
    elif use != TENSORS and config and (problem := architecture_problem(config, use) or _unmade(folder)):
        problems.append(f"{flag}: {problem}")
    if problems:
        raise UserError(*problems)


def read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object out of a file; what is wrong with it goes to ``problems``, and {} comes back."""
    if is_pointer(path):
        problems.append(f"{path}: {POINTER_ADVICE}")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: cannot be read ({error}); download or save the model again")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: is not a JSON object; download or save the model again")
        return {}
    return content


POINTER_ADVICE = ("a Git LFS pointer, which stands for a file and is not it; fetch the file with git lfs pull, or download "
                  "it again")


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS puts in the place of one that was not fetched."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def quantisation(config: dict[str, Any]) -> str:
    """What a config.json says about quantised weights, e.g. "gptq, 4 bits"; empty: nothing."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if isinstance(found, dict) and found:
                method = str(found.get("quant_method") or ("bitsandbytes" if _in_bits(found) else key))
                bits = found.get("bits") or (4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else None)
                return f"{method}, {bits} bits" if bits else method
    return ""


def _in_bits(found: dict[str, Any]) -> bool:
    return bool(found.get("load_in_4bit") or found.get("load_in_8bit"))


def packed(tensors: Iterable[TensorInfo]) -> str:
    """What names and types of tensors say about quantised weights, with an example; empty: nothing."""
    for info in tensors:
        for pattern, what in _PACKED:
            if re.search(pattern, info.name):
                return f"tensor '{info.name}': {what}"
        if info.dtype.startswith("F8_"):
            return f"tensor '{info.name}' is {info.dtype}"
    return ""


def _unmade(folder: Path) -> str:
    """Why transformers cannot read the settings of a type that it knows; empty where it can."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a setting of another type, sizes that do not divide, RoPE without its factor
        return (f"its {CONFIG} holds what transformers cannot use ({' '.join(str(error).split())[:200]}); give the {CONFIG} "
                "that was saved with the weights")
    return ""


def _ends_problems(folder: Path) -> list[str]:
    """What is wrong with the file that says where answers end; transformers passes over one that it cannot read."""
    path = folder / "generation_config.json"
    problems: list[str] = []
    if path.is_file():
        ends = read_config(path, problems).get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
                problems.append(f"{path}: eos_token_id holds {end!r}, allowed are ids (whole numbers); write the token's id")
    return problems


def architecture_problem(config: dict[str, Any], use: str) -> str:
    """Why transformers has no class of its own for this model; empty where it has one."""
    # transformers' tables of names: importing them loads no model's code
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    if not isinstance(kind, str):
        return f"its {CONFIG} names no model_type; give a folder that transformers' save_pretrained wrote"
    if kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            return (f"model_type '{kind}' comes with Python code of its own (auto_map in {CONFIG}), which is never "
                    "executed; convert it to an architecture that transformers knows, e.g. llama, or take such a model")
        return (f"model_type '{kind}' is not known to transformers {__version__}; install a release that knows it, or give "
                "another model")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if use == CAUSAL else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if kind not in known:
        return (f"model_type '{kind}' is no {use} in transformers {__version__}; give a model of another type, e.g. llama")
    return ""


def gguf_advice(file: Path) -> str:
    """Why a GGUF file is not opened, and a line that turns it into a folder that is."""
    # the marker of the quantisation that it had would keep transformers from writing what it has dequantised
    line = (f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a = dict("
            f"pretrained_model_name_or_path={str(file.parent)!r}, gguf_file={file.name!r}); m = M.from_pretrained(**a); "
            f"m.hf_quantizer = None; del m.config.quantization_config; m.save_pretrained('NEW'); "
            f"T.from_pretrained(**a).save_pretrained('NEW')")
    return f"{file.name} is a GGUF file, which is not opened; turn it into a folder once and give that: python -c \"{line}\""


def _one_a_file(problems: Iterable[str]) -> list[str]:
    """Each file's first fault: a shard that was cut has one for each of its tensors."""
    first: dict[str, list[str]] = {}
    for problem in problems:
        first.setdefault(problem.split(": ", 1)[0], []).append(problem)
    return [found[0] + (f" (and {len(found) - 1} more faults of this file)" if found[1:] else "")
            for found in first.values()]
