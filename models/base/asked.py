"""A loaded model asked with a few tokens: does it compute numbers, and does a token see only those before it?

Two things that a folder's headers cannot tell, and that answers under a model's name would hide: NaN in its weights, and a
model that reads both ways (BERT's kind, which transformers opens as a language model too).
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from errors import UserError

#: Tokens of each of the two rows.
_TOKENS = 6


@torch.no_grad()
def reads_padding(model: PreTrainedModel) -> bool:
    """Whether padding in front of a row changes what the model writes after it, in spite of the mask (RWKV has none)."""
    row = (torch.arange(_TOKENS, device=model.device) % model.config.get_text_config().vocab_size)[None]
    padded = torch.cat((row[:, -1:], row[:, -1:], row), 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    # as generation counts them: a table of positions starts with the row, not with the padding
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if _takes_positions(model) else {}
    alone, behind = (model(input_ids=ids, attention_mask=seen, use_cache=False, **more).logits[0, -1].float()
                     for ids, seen, more in ((row, torch.ones_like(row), {}), (padded, mask, places)))
    return float((alone - behind).abs().max()) > float(alone.abs().max()) * (1e-3 if model.dtype == torch.float32 else 5e-2)


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def check_forward(model: PreTrainedModel, name: str) -> None:
    """Two rows that differ in their last token: what is written before it must be the same numbers.

    Args:
        model: in evaluation mode.
        name: how messages call it.

    Raises:
        UserError: it writes NaN, or its tokens look ahead.
    """
    ids = (torch.arange(_TOKENS, device=model.device) % model.config.get_text_config().vocab_size).repeat(2, 1)
    ids[1, -1] = 0
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    if torch.isnan(logits).any():
        raise UserError(f"{name}: its logits are NaN: weights hold NaN or infinity, or overflow in "
                        f"{str(model.dtype).removeprefix('torch.')}; download the model again, or give --dtype float32")
    before = logits[:, :-1]
    # one product in two rows may round differently; a token that looks ahead changes whole logits
    near = float(before.abs().max()) * (1e-3 if model.dtype == torch.float32 else 5e-2)
    if float((before[0] - before[1]).abs().max()) > near:
        raise UserError(f"{name}: tokens of this {type(model).__name__} look ahead (is_decoder, use_bidirectional_attention "
                        "in config.json): it fills gaps or embeds texts and cannot write answers or be scored on them; give "
                        "a causal language model")
