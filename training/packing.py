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
from errors import UserError
from models.base.attention import PACKED, Spans
from models.base.families import FAMILIES
from models.base.heads import LogitRule, head_weight, logit_rule

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
    # the lengths stand for the whole mask below, which only padding on the right allows
    lengths = attention_mask.sum(1).tolist()
    if not torch.equal(attention_mask.bool().cpu(), torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]):
        raise ValueError("packing: rows must be padded on the right")
    id_rows, label_rows = input_ids.tolist(), labels.tolist()
    # by content, not by position in the batch: pairs that share a prompt share it, too
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        first = next((t for t in range(length) if label_rows[row][t] != IGNORE), length)
        groups.setdefault(tuple(id_rows[row][:first]), []).append(row)
    tokens: list[int] = []
    positions: list[int] = []
    sources, targets, cells = [], [], []
    places, visible = [], []
    for prompt, rows in groups.items():
        # owner 0: the prompt, which all see; answers count from 1
        start, owners = len(tokens), [0] * len(prompt)
        tokens += prompt
        positions += range(len(prompt))
        for number, row in enumerate(rows, 1):
            # what stands before the answer's first token is the prompt's last one
            before = start + len(prompt) - 1
            for t in range(len(prompt), lengths[row]):
                # the first token of a row has nothing before it that could predict it
                if label_rows[row][t] != IGNORE and t > 0:
                    sources.append(before)
                    targets.append(label_rows[row][t])
                    cells.append(row * (input_ids.shape[1] - 1) + t - 1)
                before = len(tokens)
                tokens.append(id_rows[row][t])
                # as if each answer alone stood behind the prompt: RoPE must not see the answers before it
                positions.append(t)
                owners.append(number)
        owner = torch.tensor(owners)
        places.append(slice(start, len(tokens)))
        # causal within the stretch, and of the answers only one's own
        visible.append((torch.ones(len(owners), len(owners), dtype=torch.bool).tril_()
                        & ((owner[None] == 0) | (owner[None] == owner[:, None]))).to(input_ids.device))

    def as_ids(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=input_ids.device)

    row_positions = as_ids(positions)
    return Packed(as_ids(tokens)[None], row_positions[None], Spans(places, visible, row_positions), as_ids(sources),
                  as_ids(targets), as_ids(cells))


def packable(model: PreTrainedModel) -> bool:
    """Whether ``models/base/families.py`` has a row for it and no token looks ahead; others are left to TRL's forward."""
    return model.config.model_type in FAMILIES and not getattr(model.config, "use_bidirectional_attention", None)


def pack_forward(model: PreTrainedModel) -> bool:
    """Let a model that TRL gave a fused head read its batches packed; says whether it can (``packable``).

    The forward pass with ``fused_lm_head=True`` then takes one row; every other one stays as it is.

    Raises:
        UserError: it cannot, and TRL's fused head would score other logits than the model's own.
    """
    # asked again, e.g. for the evaluation set: a second wrapper would wrap the first
    if model.config._attn_implementation == PACKED:
        return True
    if not packable(model):
        check_padded(model)
        return False
    padded, rule = model.forward, logit_rule(model)
    # also where a pass stays padded: without spans it is the device's own attention
    model.set_attn_implementation(PACKED)

    # the function beneath the bound method keeps its whole signature, which Trainer and generate read
    @functools.wraps(padded.__func__)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return padded(*args, **kwargs)
        return _scored(self, pack(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"]), kwargs["labels"], rule)

    model.forward = types.MethodType(forward, model)
    return True


def refuse_head_lora(model: PreTrainedModel) -> None:
    """A UserError where the output head bears a LoRA: TRL takes the head's weight alone, and would never train it.

    A LoRA starts at no change, so that comparing logits would not show it.
    """
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise UserError(f"--lora_targets: preference training of model type '{model.config.model_type}' takes no LoRA on "
                        "the output head; leave the head out, or train it with --method sft")


@torch.no_grad()
def check_padded(model: PreTrainedModel) -> None:
    """Hold TRL's fused head, where the model has one, to the model's own logits on a row of a few tokens.

    TRL goes by names in config.json (``logit_scale`` and so on) and by the head's weight, whatever the model's forward does.

    Raises:
        UserError: they differ.
    """
    refuse_head_lora(model)
    ids = (torch.arange(8, device=model.device) % model.config.get_text_config().vocab_size)[None]
    training = model.training
    model.eval()
    try:
        found = getattr(model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True), "log_probs", None)
        own = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    finally:
        model.train(training)
    # without TRL's head there is nothing to check
    if found is None:
        return
    wanted = own.gather(1, ids[0, 1:, None])[:, 0]
    near = (1e-3 if model.dtype == torch.float32 else 0.1) * (1 + float(wanted.abs().max()))
    if float((found[0] - wanted).abs().max()) > near:
        raise UserError(f"--model_name_or_path: preference training would score other logits than those of model type "
                        f"'{model.config.model_type}'; use one of {', '.join(sorted(FAMILIES))}")


def _scored(model: PreTrainedModel, packed: Packed, labels: Tensor, rule: LogitRule) -> FusedCausalLMOutput:
    """What TRL's fused head returns for labels (rows, time): per-token numbers (rows, time - 1), 0 where nothing is scored.

    Hidden states are (1, length, d); the head meets the (answers, d) of ``packed.sources`` alone.
    """
    # a mask of four dimensions is handed through as it is; the spans decide instead
    hidden = model.base_model(
        input_ids=packed.tokens, position_ids=packed.positions, spans=packed.spans, use_cache=False,
        attention_mask=torch.zeros(1, 1, 1, 1, device=labels.device)).last_hidden_state[0]
    if not packed.spans.reached:
        raise RuntimeError(f"{type(model).__name__} does not hand its arguments on to its attention: it cannot be packed")
    head = model.get_output_embeddings()
    weight, bias = head_weight(head), head.bias
    if isinstance(weight, DTensor):  # sharded by FSDP
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):  # or by DeepSpeed
        per_token = ChunkedLogProbFunction.apply(  # temperature 1
            hidden[packed.sources], weight, bias, packed.targets, 1.0, CHUNK, rule.cap, rule.scale, OUTPUTS)
    mask = labels[:, 1:] != IGNORE
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    # log_sum_sq_probs, which only WPO reads, was not asked for and is None
    tables = {name: values.new_zeros(mask.numel()).scatter(0, packed.cells, values).view(mask.shape)
              for name, values in zip(fields, per_token, strict=True) if values is not None}
    return FusedCausalLMOutput(loss=-tables["log_probs"].sum() / mask.sum().clamp(min=1), label_mask=mask, **tables)
