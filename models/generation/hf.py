"""Back end hf: transformers' generate on one padded batch after the other, with a cache that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.base.asked import reads_padding
from models.base.families import FAMILIES
from models.generation.answers import Answer, Decoding, answer_of, check_lengths, encoded, left_pad, pad_id, stop_ids
from models.runs import Loaded


class HfAnswerer:
    """See ``backends.Answerer``; a batch is the unit."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        self.loaded, self.unit = loaded, batch_size

    def prepare(self, prompts: Sequence[str], new: int) -> None:
        check_lengths(self.loaded, prompts, new)

    def answer(self, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
        return answer_batch(self.loaded, prompts, decoding, seed)


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
    return answers_to(loaded, encoded(loaded, prompts), decoding, seed)


def answers_to(loaded: Loaded, rows: Sequence[Sequence[int]], decoding: Decoding, seed: int, **options: Any) -> list[Answer]:
    """Answer prompts given as token ids; ``options`` go on to transformers' generate."""
    ids, mask = left_pad(rows, pad_id(loaded.tokenizer), loaded.device)
    stops = {"stop_strings": [loaded.template.stop], "tokenizer": loaded.tokenizer} if loaded.template.stop else {}
    ends = stop_ids(loaded)
    torch.manual_seed(seed)
    output: Tensor = loaded.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=decoding.max_new_tokens, do_sample=decoding.do_sample,
        eos_token_id=ends or None, pad_token_id=pad_id(loaded.tokenizer), **decoding.sampling, **stops, **options,
    )
    # rows were padded on the left to one length: answers begin at the same place
    return [answer_of(row, ends, loaded) for row in output[:, ids.shape[1]:].tolist()]
