"""Preference pairs without padding, and each prompt once.

A DPO batch holds every prompt twice and pads each short answer to the longest one: of the embedded pairs that is more than
half of all tokens. Here a batch becomes one row: per prompt its tokens, then the tokens of every answer to it, which see the
prompt and themselves. The log-probabilities are those of the padded batch but for rounding; only answer tokens go through
the output head.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from data.encode import IGNORE
from models.base.attention import PACKED, Spans
from models.base.families import FAMILIES

#: Per-token numbers that TRL's DPO trainer logs.
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
#: Vocabulary entries at a time: the logits of 1,000 answer tokens are then 33 MB of fp32.
CHUNK = 8192


@dataclass
class Packed:
    """A batch as one row.

    Args:
        tokens, positions: (1, length).
        spans: one per prompt.
        sources: (answers,) where the hidden state lies that predicts each answer token.
        targets: (answers,) ids.
        cells: (answers,) their places in a flattened (rows, time - 1) table, as a padded batch would have them.
    """

    tokens: Tensor
    positions: Tensor
    spans: Spans
    sources: Tensor
    targets: Tensor
    cells: Tensor


def pack(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Packed:
    """Rows that share their prompt, the tokens before the first label, become one span.

    Args:
        input_ids, attention_mask, labels: (rows, time); padding on the right, labels IGNORE where nothing is scored.

    Raises:
        ValueError: padding that is not on the right.
    """
    lengths = attention_mask.sum(1).tolist()
    if not torch.equal(attention_mask.bool().cpu(), torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]):
        raise ValueError("packing: rows must be padded on the right")
    ids, wanted = input_ids.tolist(), labels.tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        first = next((t for t in range(length) if wanted[row][t] != IGNORE), length)
        groups.setdefault(tuple(ids[row][:first]), []).append(row)
    tokens, positions, sources, targets, cells = [], [], [], [], []
    places, seen = [], []
    for prompt, rows in groups.items():
        start, owners = len(tokens), [0] * len(prompt)
        tokens += prompt
        positions += range(len(prompt))
        for number, row in enumerate(rows, 1):
            # what stands before the answer's first token is the prompt's last one
            before = start + len(prompt) - 1
            for t in range(len(prompt), lengths[row]):
                if wanted[row][t] != IGNORE and t > 0:
                    sources.append(before)
                    targets.append(wanted[row][t])
                    cells.append(row * (input_ids.shape[1] - 1) + t - 1)
                before = len(tokens)
                tokens.append(ids[row][t])
                positions.append(t)
                owners.append(number)
        owner = torch.tensor(owners)
        places.append(slice(start, len(tokens)))
        seen.append((torch.ones(len(owners), len(owners), dtype=torch.bool).tril_()
                     & ((owner[None] == 0) | (owner[None] == owner[:, None]))).to(input_ids.device))

    def row(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=input_ids.device)

    return Packed(row(tokens)[None], row(positions)[None], Spans(places, seen), row(sources), row(targets), row(cells))


def packable(model: PreTrainedModel) -> bool:
    """Whether ``models/base/families.py`` has a row for it and the model neither windows, looks ahead nor scales logits.

    All others are left to TRL's own forward pass.
    """
    config = model.config.get_text_config()
    special = ("sliding_window", "use_bidirectional_attention", "final_logit_softcapping", "logit_scale", "logits_scaling",
               "output_multiplier", "lm_head_multiplier")
    values = [getattr(config, name, None) for name in special]
    return config.model_type in FAMILIES and all(value is None or value is False for value in values)


def pack_forward(model: PreTrainedModel) -> bool:
    """Let a model that TRL gave a fused head read its batches packed; says whether it can (``packable``).

    The forward pass with ``fused_lm_head=True`` then takes one row; every other one stays as it is.
    """
    if model.config._attn_implementation == PACKED:
        return True
    if not packable(model):
        return False
    padded = model.forward
    model.set_attn_implementation(PACKED)

    # the function beneath the bound method keeps its whole signature, which Trainer and generate read
    @functools.wraps(padded.__func__)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return padded(*args, **kwargs)
        return _scored(self, pack(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"]), kwargs["labels"])

    model.forward = types.MethodType(forward, model)
    return True


def _scored(model: PreTrainedModel, packed: Packed, labels: Tensor) -> FusedCausalLMOutput:
    # a mask of four dimensions is handed through as it is; the spans decide instead
    hidden = model.base_model(
        input_ids=packed.tokens, position_ids=packed.positions, spans=packed.spans, use_cache=False,
        attention_mask=torch.zeros(1, 1, 1, 1, device=labels.device)).last_hidden_state[0]
    if not packed.spans.reached:
        raise RuntimeError(f"{type(model).__name__} does not hand its arguments on to its attention: it cannot be packed")
    head = model.get_output_embeddings()
    weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight  # sharded by FSDP
    with maybe_gather_lm_head_ctx(weight, head.bias):  # or by DeepSpeed
        found = ChunkedLogProbFunction.apply(
            hidden[packed.sources], weight, head.bias, packed.targets, 1.0, CHUNK, None, 1.0, OUTPUTS)
    mask = labels[:, 1:] != IGNORE
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    tables = {name: values.new_zeros(mask.numel()).scatter(0, packed.cells, values).view(mask.shape)
              for name, values in zip(fields, found, strict=True) if values is not None}
    return FusedCausalLMOutput(loss=-tables["log_probs"].sum() / mask.sum().clamp(min=1), label_mask=mask, **tables)
