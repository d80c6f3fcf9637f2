"""Base models: found, checked, loaded.

Only safetensors weights are read and remote code is never executed. Embeddings are never resized: a tokenizer without
a pad token pads with its end token, which is harmless because masks and labels are built from lengths.

What a library only warns about is an error here: weights that are missing or left over, tokenizers without a vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from errors import UserError, nearest_place
from models.base import attention, spread, tokenizers
from models.base.asked import check_forward
from models.base.folders import CAUSAL, CLASSIFIER, check_folder, gguf_advice, quantisation, read_config
from models.checkpoints.fingerprints import fingerprint, fingerprint_like, same_base
from models.run_folders import ADAPTER

log = logging.getLogger(__name__)
#: Settings in which a model and its quantised copy agree.
_STRUCTURE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "vocab_size")


def base_path(name: str, cache_dir: str | None = None, flag: str = "", use: str = CAUSAL) -> Path:
    """The local folder of a base model: the embedded one, a given folder, or a hub name's snapshot; its headers are checked.

    Args:
        flag: how the user named it, for messages; empty: with --model_name_or_path.
        use: what it is opened for (models/base/folders.py).

    Raises:
        UserError: the folder is no model, or none that can be opened; the hub cannot be reached and its cache does not hold
            the model.
    """
    # imported here: data lies below models, and a base on disk needs none of it
    if name == "embedded":
        from data.gguf_model import embedded_model_dir

        return embedded_model_dir()
    flag = flag or f"--model_name_or_path {name}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder, flag, use)
        return folder.resolve()
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(f"{flag}: {gguf_advice(folder)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag}: no such folder{nearest_place(folder)}; give 'embedded', a folder, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        # no *.bin and no *.py: neither pickles nor remote code reach this machine
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
        folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types; the user needs one sentence
        raise UserError(
            f"{flag}: neither a local folder{nearest_place(folder)} nor to be had from the hub "
            f"({type(error).__name__}); allowed: 'embedded', a local folder, a hub name that this machine can reach "
            "(gated models need HF_TOKEN in the environment)"
        ) from None
    if not any(folder.glob("*.safetensors")):
        kind = "AutoModelForSequenceClassification" if use == CLASSIFIER else "AutoModelForCausalLM"
        raise UserError(
            f"{flag}: what the hub gave holds no *.safetensors; pickled weights may run code when they are read and are not "
            f"fetched. Where that does no harm, {kind}.from_pretrained({name!r}).save_pretrained({name!r}), and "
            "AutoTokenizer likewise, make a folder of this name, which is taken where a command starts beside it"
        )
    check_folder(folder, flag, use)
    return folder


def load_tokenizer(folder: Path, base: Path | None = None, ends: bool = False) -> Any:
    """The tokenizer of a model folder, with a pad token, fit for the model of ``base`` (by default the folder itself).

    Args:
        ends: keep the end token that it may append to every text (classifiers).

    Raises:
        UserError: no tokenizer, one that cannot be read here, or one that was made for another model.
    """
    return tokenizers.load(folder, _rows(base or folder), ends)


def _rows(folder: Path) -> int | None:
    """Rows of a model's embedding as its config.json says; None where it says nothing."""
    content = _config(folder)
    inner = content.get("text_config")
    return content.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)


def load_base(folder: Path, dtype: torch.dtype, device: torch.device, spread_out: bool = False) -> PreTrainedModel:
    """A causal LM in evaluation mode; its generation settings are reset so that every model decodes alike.

    Args:
        spread_out: over all GPUs (``models/base/spread.py``) instead of ``device``.

    Raises:
        UserError: its weights are not those of its config.json: some are missing, left over, or of other shapes; it computes
            NaN, or its tokens look ahead.
    """
    # names and shapes first: what no class can be made of is told in a moment
    empty = skeleton(folder)
    config = empty.config
    kernel = attention.implementation_for(config, device)
    try:
        skeleton(folder, kernel)
    except UserError:  # Falcon has a table of its own and no place for others
        kernel = "eager"
    # a kernel that config.json names (flash_attention_2) wins over the argument, and may not be installed
    config._attn_implementation = kernel
    named: dict[str, Any] = {"config": config} if "_attn_implementation" in _config(folder) else {}
    # read to where it will live: the host's memory need not hold it, least of all once for every process
    if spread_out:
        named["device_map"] = spread.over_devices(empty, dtype, str(folder))
    elif device.type != "cpu":
        named["device_map"] = {"": device}
    model = read_weights(folder, dtype=dtype, attn_implementation=kernel, **named).eval()
    check_forward(model, str(folder))
    return model


def read_weights(folder: Path, **options: Any) -> PreTrainedModel:
    """A causal LM, every weight of it read from the folder; ``options`` are those of ``from_pretrained``.

    Raises:
        UserError: see ``load_base``.
    """
    said = hf_logging.get_verbosity()
    try:
        # its table of what lacks or is left over: told in a sentence below
        hf_logging.set_verbosity_error()
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options)
    except RuntimeError as error:
        # transformers' own: a table of every weight
        if "mismatch" not in str(error):
            raise
        raise UserError(f"{folder}: some of its weights have other shapes than its config.json says; give the config.json "
                        f"that was saved with them ({_example(error)})") from None
    finally:
        hf_logging.set_verbosity(said)
    odd = {"lacks weights of": report["missing_keys"], "holds weights that are no part of": report["unexpected_keys"]}
    if problems := [f"{folder}: {what} {type(model).__name__}, {len(names)} of them, e.g. {min(names)}; transformers would "
                    "go on without a word; give the config.json that was saved with the weights, or a whole model"
                    for what, names in odd.items() if names]:
        raise UserError(*problems)
    keep_ends(model)
    return model


def _example(error: Exception) -> str:
    return next((line.strip()[:160] for line in str(error).splitlines() if "size" in line or "mismatch" in line.lower()), "")


def keep_ends(model: PreTrainedModel) -> None:
    """Reset a model's generation settings but for the ids that end an answer: all that its two configurations list."""
    pad = model.generation_config.pad_token_id
    listed = [model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id]
    ends = sorted({i for ids in listed if ids is not None for i in (ids if isinstance(ids, list) else [ids])})
    # one id as a number, as its own config spells it
    model.generation_config = GenerationConfig(eos_token_id=ends[0] if len(ends) == 1 else ends or None, pad_token_id=pad)


def skeleton(folder: Path, kernel: str = "eager") -> PreTrainedModel:
    """The model of a folder without its weights: names and shapes, no memory.

    Args:
        kernel: of its attention; by default one that every model has.

    Raises:
        UserError: transformers cannot make one of its config.json.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # the file's own choice may be a kernel that is not installed
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    except Exception as error:  # KeyError for an unknown activation, TypeError, ValueError: one sentence is wanted
        said = " ".join(str(error).split())[:160] or "no reason given"
        raise UserError(f"{folder / 'config.json'}: transformers cannot make a model of it ({type(error).__name__}: {said})"
                        "; give the config.json that was saved with the weights") from None


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters only: ``model.to`` would also round RoPE's inverse frequencies, which must stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def settled(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, spread_out: bool = False) -> PreTrainedModel:
    """A model that was put together on the CPU, cast and moved to where it answers."""
    cast_parameters(model, dtype)
    if spread_out:
        from accelerate import dispatch_model

        # keys and values stay with their layers
        dispatch_model(model, spread.over_devices(model, dtype, "the model"), skip_keys=model._skip_keys_device_placement)
    else:
        model.to(device)
    # it was put together with the CPU's attention
    if device.type != "cpu":
        model.set_attn_implementation(attention.implementation_for(model.config, device))
    return model.eval()


def check_base(folder: Path, base: Path) -> str:
    """The fingerprint of ``base`` if the adapter in ``folder`` was trained on it.

    Raises:
        UserError: it was trained on another base, or nothing tells which.
    """
    want = _recorded(folder)
    if want is None:
        named = _config(folder, ADAPTER).get("base_model_name_or_path") or ""
        named = str(Path(named).expanduser()) if named and isinstance(named, str) else ""
        # a hub name says which base was meant, not which weights were used; nothing at all would be this folder here
        if not named or not (Path(named) / "config.json").is_file():
            raise UserError(
                f"{folder}: has no manifest.json with the fingerprint of its base, and its base_model_name_or_path "
                f"'{named}' is no local folder of a model; train it with align_basemodel.py, or point that entry at the base"
            )
        if method := quantisation(_config(Path(named))):
            _check_quantised(folder, Path(named), method, base)
            return fingerprint(base)
        want = fingerprint(Path(named))
    if not same_base(want, base):
        have, recorded = fingerprint_like(want, base), _config(folder, ADAPTER).get("base_model_name_or_path")
        hint = f" ({ADAPTER} names {recorded})" if recorded and str(recorded) != str(base) else ""
        raise UserError(
            f"{folder}: was trained on another base (fingerprint {want[:12]}, but {base} has {have[:12]}); "
            f"give its base with --model_name_or_path{hint}, or train the adapter again on this one"
        )
    return fingerprint(base)


def _check_quantised(folder: Path, named: Path, method: str, base: Path) -> None:
    """An adapter whose base was quantised belongs on the full-precision model if the base was held in 4 or 8 bits while it
    trained (QLoRA); codes that were fitted to data (GPTQ, AWQ) are another model."""
    one, two = _config(named), _config(base)
    odd = [key for key in _STRUCTURE if one.get(key) != two.get(key)]
    if not method.startswith("bitsandbytes"):
        raise UserError(f"{folder}: was trained on a quantised base ({method}, {named}), whose weights are not those of "
                        f"{base}; train it on the full-precision model with align_basemodel.py (--base_quantization nf4 "
                        "saves the memory)")
    if odd:
        raise UserError(f"{folder}: was trained on {named} ({method}), which is not {base} in fewer bits: {odd[0]} is "
                        f"{one.get(odd[0])} there and {two.get(odd[0])} here; give its base with --model_name_or_path")
    log.info("%s: was trained on %s (%s); put on the full-precision base %s, of the same sizes", folder, named, method,
             base)


def _recorded(folder: Path) -> str | None:
    """The base's fingerprint in the manifest of a run; None without one."""
    inputs = _config(folder, "manifest.json").get("inputs") or {}
    want = inputs.get("base") if isinstance(inputs, dict) else inputs
    if want is not None and not isinstance(want, str):
        raise UserError(f"{folder / 'manifest.json'}: the fingerprint of the base (inputs, base) is no text; delete it "
                        f"and point base_model_name_or_path of {ADAPTER} at the base")
    return want


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a folder, {} where there is no such file; a UserError where it is damaged."""
    problems: list[str] = []
    content = read_config(folder / name, problems) if (folder / name).is_file() else {}
    if problems:
        raise UserError(*problems)
    return content
