"""--layout gguf: one file for llama.cpp, architecture llama, with experts or without, written block by block in place.

Names, order of rows and settings are those that llama.cpp's convert_hf_to_gguf.py gives a Llama or a Mixtral. An expert's
matrix is a slice of one tensor of all experts; a row of queries or keys goes where llama.cpp's rotary embedding wants it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import pi, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from models.base.loading import load_tokenizer
from models.base.tokenizers import turn_end
from models.checkpoints.configs import filled_known
from models.checkpoints.header import KINDS
from models.checkpoints.writer import Layout, Place, Writer
from models.export.companions import tokenizer_folder
from models.export.gguf_vocabulary import add_vocabulary, splitting
from models.export.layouts import MoeLayout
from models.export.sources import Source
from models.merging.plan import Job, MergePlan

_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight"}
_BLOCK = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
#: A job's name is its tensor's, and behind this mark its expert's number.
_MARK = "#"
EXPERTS = MoeLayout("gguf", ("llama", "mistral"), "blk.{layer}.ffn_gate_inp.weight",
                    f"blk.{{layer}}.ffn_{{part}}_exps.weight{_MARK}{{expert}}", {"gate": "gate", "up": "up", "down": "down"},
                    lambda known, experts, top_k: {}, lambda known: [])
#: gguf's types and its types of whole files, by ours.
_TYPES = {"F32": (0, 0), "F16": (1, 1), "Q8_0": (8, 7), "BF16": (30, 32)}
#: Q8_0: so many values share a scale, in so many bytes.
_BLOCK_VALUES, _BLOCK_BYTES = 32, 34
_FREQUENCIES = "rope_freqs.weight"


def problems(source: Source) -> list[str]:
    """What keeps a source from being a file of llama.cpp's architecture llama; each sentence says what to do instead."""
    if source.kind not in EXPERTS.families:
        return [f"--layout gguf: writes {' and '.join(EXPERTS.families)}; {source.name} is a {source.kind}; write it with "
                "another layout and turn that folder into GGUF with llama.cpp's convert_hf_to_gguf.py"]
    known = filled_known(source.config)
    found: list[str] = []
    window = getattr(known, "sliding_window", None)
    if window and window < known.max_position_embeddings:
        found.append(f"sliding_window is {window}, and llama.cpp's llama has none")
    if (act := known.hidden_act) != "silu":
        found.append(f"hidden_act is {act}, where llama.cpp's llama has silu")
    if (kind := known.rope_parameters.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        found.append(f"its rotary embedding is scaled by {kind}, which is not written here")
    if odd := [name for name in source.tensors if not _named(name)]:
        found.append(f"has {odd[0]}, for which there is no place")
    found = [f"--layout gguf: {source.name}: {problem}; write it with --layout {'mixtral' if source.moe else 'dense'} and "
             "turn that folder into GGUF with llama.cpp's convert_hf_to_gguf.py" for problem in found]
    try:
        splitting(tokenizer_folder(source))
    except UserError as error:
        found += error.problems
    return found


def _named(name: str) -> str:
    """llama.cpp's name of a tensor; empty where it has none."""
    place = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.weight", name)
    if not place:
        return _TOP.get(name, "")
    part = _BLOCK.get(place[2], "")
    return f"blk.{place[1]}.{part}.weight" if part else ""


@dataclass(frozen=True)
class GgufLayout(Layout):
    """One file.

    Args:
        packed: jobs that are written as Q8_0.
        heads: job -> heads of a matrix whose rows are put in llama.cpp's order.
        columns: job -> values of a row.
        constants: (first byte, bytes) that no job writes.
    """

    packed: frozenset[str] = frozenset()
    heads: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)
    constants: tuple[tuple[int, bytes], ...] = ()


class GgufWriter(Writer):
    """Writes values as the layout wants them: in blocks of 8 bits, rows of queries and keys in llama.cpp's order."""

    layout: GgufLayout

    def write(self, name: str, first: int, data: Tensor) -> None:
        """As ``Writer.write``; a tensor of heads comes in whole rows."""
        columns, packed, heads = self.layout.columns[name], name in self.layout.packed, self.layout.heads.get(name)
        if not packed and not heads:
            super().write(name, first, data)
            return
        encoded = _q8_0(data) if packed else data.reshape(-1).contiguous().view(torch.uint8).numpy()
        if not heads:
            self.put(name, first // _BLOCK_VALUES * _BLOCK_BYTES, encoded.data)
            return
        rows = encoded.reshape(data.numel() // columns, -1)
        half = self.layout.places[name].nbytes // rows.shape[1] // heads // 2
        for number, row in enumerate(rows, first // columns):
            head, within = divmod(number, 2 * half)
            # the two halves of a head, kept apart by transformers, alternate here
            place = head * 2 * half + within % half * 2 + within // half
            self.put(name, place * rows.shape[1], np.ascontiguousarray(row).data)

    def finish(self) -> None:
        for start, values in self.layout.constants:
            self.put_at(next(iter(self.layout.headers)), start, memoryview(values))
        super().finish()


def _q8_0(data: Tensor) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(data.float().reshape(-1, _BLOCK_VALUES).numpy(), GGMLQuantizationType.Q8_0).reshape(-1)


def planned(plan: MergePlan, source: Source, out_dtype: str, file: str, title: str) -> tuple[MergePlan, GgufLayout]:
    """The plan with llama.cpp's names and types, and its file.

    Args:
        plan: of a dense model, or of experts under ``EXPERTS``.
        out_dtype: as --out_dtype.
        title: the model's name in the file.
    """
    known = filled_known(source.config)
    heads = {"attn_q": known.num_attention_heads, "attn_k": known.num_key_value_heads}
    jobs, packed, turned = [], set(), {}
    for job in plan.jobs:
        name = job.name if job.name.startswith("blk.") else _named(job.name)
        part = name.split(".")[-2]
        # as llama.cpp's converter: vectors and routers are fp32 in every file
        small = len(job.shape) == 1 or part == "ffn_gate_inp"
        if out_dtype == "q8_0" and not small and not job.shape[-1] % _BLOCK_VALUES:
            packed.add(name)
        dtype = "F32" if small or name in packed else "F16" if out_dtype == "q8_0" else job.dtype
        if part in heads:
            turned[name] = heads[part]
        jobs.append(replace(job, name=name, dtype=dtype, by_rows=part in heads))
    return replace(plan, jobs=tuple(jobs)), _layout(jobs, packed, turned, source, known, file, title)


def _layout(jobs: list[Job], packed: set[str], turned: dict[str, int], source: Source, known: Any, file: str, title: str
            ) -> GgufLayout:
    tensors: dict[str, list[Job]] = {}
    for job in jobs:
        tensors.setdefault(job.name.partition(_MARK)[0], []).append(job)
    frequencies = _frequencies(known)
    header, starts = _header(tensors, packed, frequencies, source, known, title)
    places = {}
    for name, own in tensors.items():
        start = starts[name]
        for job in own:
            places[job.name] = Place(file, job.dtype, start, size := _bytes(job, packed))
            start += size
    constants = () if frequencies is None else ((starts[_FREQUENCIES], frequencies.tobytes()),)
    return GgufLayout({file: header}, {file: starts[""]}, places, frozenset(packed), turned,
                      {job.name: job.shape[-1] for job in jobs}, constants)


def _bytes(job: Job, packed: set[str]) -> int:
    values = prod(job.shape)
    return values // _BLOCK_VALUES * _BLOCK_BYTES if job.name in packed else values * KINDS[job.dtype][0]


def _header(tensors: Mapping[str, list[Job]], packed: set[str], frequencies: np.ndarray | None, source: Source, known: Any,
            title: str) -> tuple[bytes, dict[str, int]]:
    """The file up to its first value, and where each tensor begins; "" is where the file ends."""
    from gguf import GGMLQuantizationType, GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "header", "llama")
        kinds = [("Q8_0" if job.name in packed else job.dtype) for own in tensors.values() for job in own
                 if len(job.shape) > 1]
        # named after what most of it is
        _settings(writer, known, source, title, max(sorted(set(kinds)), key=kinds.count),
                  experts=any(_MARK in job.name for own in tensors.values() for job in own))
        starts, offset = {}, 0
        if frequencies is not None:
            writer.add_tensor_info(_FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
            starts[_FREQUENCIES], offset = offset, _aligned(frequencies.nbytes)
        for name, own in tensors.items():
            kind = "Q8_0" if own[0].name in packed else own[0].dtype
            nbytes = sum(_bytes(job, packed) for job in own)
            shape = (len(own), *own[0].shape) if _MARK in own[0].name else own[0].shape
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType(_TYPES[kind][0]))
            starts[name], offset = offset, offset + _aligned(nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = (Path(folder) / "header").read_bytes()
    header += bytes(-len(header) % 32)
    return header, {name: len(header) + start for name, start in starts.items()} | {"": len(header) + offset}


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % 32


def _settings(writer: Any, known: Any, source: Source, title: str, kind: str, experts: bool) -> None:
    head = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    rope = known.rope_parameters
    writer.add_name(title)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(2)
    writer.add_vocab_size(known.vocab_size)
    writer.add_context_length(known.max_position_embeddings)
    writer.add_embedding_length(known.hidden_size)
    writer.add_block_count(known.num_hidden_layers)
    writer.add_feed_forward_length(known.intermediate_size)
    writer.add_head_count(known.num_attention_heads)
    writer.add_head_count_kv(known.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(known.rms_norm_eps)
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if experts:
        writer.add_expert_count(len(source.experts))
        writer.add_expert_used_count(source.required_moe.top_k)
    folder = tokenizer_folder(source)
    tokenizer = load_tokenizer(folder, source.base.folder)
    add_vocabulary(writer, folder, tokenizer, known.vocab_size, turn_end(tokenizer))


def _frequencies(known: Any) -> np.ndarray | None:
    """By what Llama 3's scaling divides each rotary frequency; None without it."""
    rope = known.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    waves = 2 * pi * rope["rope_theta"] ** (np.arange(0, head, 2, dtype=np.float64) / head)
    old, low, high, factor = (float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor",
                                                           "high_freq_factor", "factor"))
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
