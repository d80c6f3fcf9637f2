"""What every back end shares: how is decoded, where an answer ends, what text it is, which prompts are too long."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.encode import prompt_ids
from data.readers.answer_text import is_mark
from errors import UserError
from models.base.families import FAMILIES
from models.base.positions import positions
from models.base.tokenizers import turn_end
from models.runs import Loaded


@dataclass(frozen=True)
class Decoding:
    """How every model decodes: nothing is inherited from a checkpoint's own generation settings."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def sampling(self) -> dict[str, float]:
        """The settings of a draw, empty where the likeliest token is taken."""
        # top_k 0: transformers' default of 50 would cut the distribution that --temperature and --top_p describe
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}


@dataclass(frozen=True)
class Answer:
    """Text without the end marker, and whether the model stopped by itself ("stop") or at the limit ("length")."""

    text: str
    finish: str


def encoded(loaded: Loaded, prompts: Sequence[str]) -> list[list[int]]:
    """Rendered prompts as token ids."""
    return [prompt_ids(prompt, loaded.tokenizer, loaded.template) for prompt in prompts]


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
    lengths = [len(row) for row in encoded(loaded, prompts)]
    if beyond := sum(length >= reach for length in lengths):
        raise UserError(f"--model_name_or_path: {beyond} of {len(prompts)} prompts are longer than the {reach} positions of "
                        f"this model (the longest: {max(lengths)} tokens); leave them out, or give a model that reads more")
    # of an unknown type it is not known whether positions go on
    if loaded.model.config.model_type not in FAMILIES and max(lengths, default=0) + new > reach:
        raise UserError(f"--max_new_tokens {new}: the longest prompt has {max(lengths)} tokens, and model type "
                        f"'{loaded.model.config.model_type}' has {reach} positions; give at most {reach - max(lengths)}")


def answer_of(ids: Sequence[int], ends: Sequence[int], loaded: Loaded) -> Answer:
    """The answer in a row of new tokens, which may go on after its end: with padding, or with what nobody asked for."""
    end = loaded.template.stop
    first = next((i for i, token in enumerate(ids) if token in ends), None)
    stopped = first is not None
    text = text_of(ids[:first], loaded.tokenizer)
    # the last token may hold more than the end marker, so the text is cut, not the ids
    if end and end in text:
        text, stopped = text[: text.index(end)], True
    return Answer(text.strip(), "stop" if stopped else "length")


@functools.lru_cache(maxsize=4)
def _special(tokenizer: Any) -> dict[int, str]:
    return {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def text_of(ids: Sequence[int], tokenizer: Any) -> str:
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
