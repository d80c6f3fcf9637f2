"""Batched answers from a loaded model, and the router's shares over what it read and wrote."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.encode import prompt_ids
from data.readers.answer_text import is_mark
from errors import UserError
from models.base.asked import reads_padding
from models.base.families import FAMILIES
from models.base.positions import positions
from models.base.tokenizers import turn_end
from models.moe.files import moe_layers
from models.moe.router import mean_probabilities
from models.runs import Loaded


@dataclass(frozen=True)
class Decoding:
    """How every model decodes: nothing is inherited from a checkpoint's own generation settings."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Answer:
    """Text without the end marker, and whether the model stopped by itself ("stop") or at the limit ("length")."""

    text: str
    finish: str


@torch.inference_mode()
def answer_batch(loaded: Loaded, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
    """Answer rendered prompts in one batch; each row stops on its own at EOS or at the template's end marker.

    Args:
        prompts: rendered texts, ending with the cue for the answer.
        seed: seeds sampling for this batch alone, so that a resumed run draws what an uninterrupted one draws.
    """
    # known families are held to it by their tests
    if len(prompts) > 1 and loaded.model.config.model_type not in FAMILIES and reads_padding(loaded.model):
        return [answer_batch(loaded, [prompt], decoding, seed + place)[0] for place, prompt in enumerate(prompts)]
    tokenizer, device = loaded.tokenizer, loaded.device
    rows = [prompt_ids(prompt, tokenizer, loaded.template) for prompt in prompts]
    ids, mask = left_pad(rows, pad_id(tokenizer), device)
    # top_k 0: transformers' default of 50 would cut the distribution that --temperature and --top_p describe
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.do_sample else {}
    stops = {"stop_strings": [loaded.template.stop], "tokenizer": tokenizer} if loaded.template.stop else {}
    ends = stop_ids(loaded)
    torch.manual_seed(seed)
    output = loaded.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=decoding.max_new_tokens, do_sample=decoding.do_sample,
        eos_token_id=ends or None, pad_token_id=pad_id(tokenizer), **sampling, **stops,
    )
    # rows were padded on the left to one length: answers begin at the same place
    return [_answer(row, ends, loaded) for row in output[:, ids.shape[1]:].tolist()]


def stop_ids(loaded: Loaded) -> list[int]:
    """Every id that ends an answer: the tokenizer's EOS, all that the model's own settings list, and what its chat template
    closes an answer with.

    Chat models end a turn with another token than a text: Gemma with <end_of_turn>, Llama-3 with <|eot_id|>, Phi-3 with
    <|end|>. generation_config.json or config.json name it, unless the model was saved without or tuned on another template.
    """
    listed = loaded.model.generation_config.eos_token_id
    ends = {loaded.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    if loaded.template.name == "chat":
        ends.add(turn_end(loaded.tokenizer))
    return sorted(ends - {None})


def pad_id(tokenizer: Any) -> int:
    """What fills rows; a tokenizer without pad and EOS may take any id, for no token looks at it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_lengths(loaded: Loaded, prompts: Sequence[str], new: int) -> None:
    """Refuse prompts beyond what the model can read, before any is answered.

    Raises:
        UserError: RoPE goes on beyond the positions that a model was trained on, and its answers turn to noise; a table of
            positions ends.
    """
    reach = positions(loaded.model.config)
    if reach is None:
        return
    lengths = [len(prompt_ids(prompt, loaded.tokenizer, loaded.template)) for prompt in prompts]
    if beyond := sum(length >= reach for length in lengths):
        raise UserError(f"--model_name_or_path: {beyond} of {len(prompts)} prompts are longer than the {reach} positions of "
                        f"this model (the longest: {max(lengths)} tokens); leave them out, or give a model that reads more")
    # of an unknown type it is not known whether positions go on
    if loaded.model.config.model_type not in FAMILIES and max(lengths, default=0) + new > reach:
        raise UserError(f"--max_new_tokens {new}: the longest prompt has {max(lengths)} tokens, and model type "
                        f"'{loaded.model.config.model_type}' has {reach} positions; give at most {reach - max(lengths)}")


def _answer(ids: list[int], ends: Sequence[int], loaded: Loaded) -> Answer:
    """The answer in a row of new tokens, which goes on with padding after its end."""
    end = loaded.template.stop
    first = next((i for i, token in enumerate(ids) if token in ends), None)
    stopped = first is not None
    text = _text(ids[:first], loaded.tokenizer)
    # the last token may hold more than the end marker, so the text is cut, not the ids
    if end and end in text:
        text, stopped = text[: text.index(end)], True
    return Answer(text.strip(), "stop" if stopped else "length")


@functools.lru_cache(maxsize=4)
def _special(tokenizer: Any) -> dict[int, str]:
    return {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _text(ids: list[int], tokenizer: Any) -> str:
    """New tokens as text, without special tokens, except those that mark reasoning: what they fence is no answer."""
    special = _special(tokenizer)
    marks = {i for i in {*ids} & {*special} if is_mark(special[i])}
    if not marks:
        return tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode([i for i in ids if i not in special or i in marks], skip_special_tokens=False)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (batch, time), padded on the left so that all rows end where generation starts."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
    return ids, mask


@torch.inference_mode()
def router_shares(loaded: Loaded, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """Mean router probability of each expert in each layer, each text counting the same: (layers, experts), fp64."""
    layers = moe_layers(loaded.model)
    tokenizer = loaded.tokenizer
    # texts of a length together, so that little is padded; a sum does not ask for their order
    rows = sorted((prompt_ids(text, tokenizer, loaded.template) for text in texts), key=len)
    total = np.zeros((len(layers), layers[0].num_experts))
    try:
        for layer in layers:
            layer.record = True
        for start in range(0, len(rows), batch_size):
            ids, mask = left_pad(rows[start : start + batch_size], pad_id(tokenizer), loaded.device)
            loaded.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            means = mean_probabilities([layer.probabilities for layer in layers], mask)  # (layers, batch, experts)
            total += means.sum(1).float().cpu().numpy()
    finally:
        # what a layer recorded would live as long as the model
        for layer in layers:
            layer.record, layer.probabilities = False, None
    return total / len(rows)
