"""Back end static: transformers' generate with one cache of a fixed length and one batch size for the whole command.

Shapes stay the same from step to step and from batch to batch, so that on a GPU transformers compiles one decoding step and
replays it as a CUDA graph. On a CPU nothing is compiled. A step reads the whole cache, filled or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import StaticCache

from models.generation.answers import Answer, Decoding, check_lengths, encoded
from models.generation.hf import answers_to
from models.runs import Loaded


class StaticAnswerer:
    """See ``backends.Answerer``; a batch is the unit."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        self.loaded, self.unit = loaded, batch_size
        self._cache: StaticCache | None = None

    def prepare(self, prompts: Sequence[str], new: int) -> None:
        check_lengths(self.loaded, prompts, new)
        self.unit = max(1, min(self.unit, len(prompts)))
        # of all prompts, also of those that are answered already: a resumed command has the same shapes
        longest = max(map(len, encoded(self.loaded, prompts)), default=0)
        self._cache = StaticCache(config=self.loaded.model.config, max_cache_len=longest + new)

    # not inference_mode: what is compiled writes to the cache, and is shared between batches
    @torch.no_grad()
    def answer(self, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
        if self._cache is None:
            raise RuntimeError("prepare first: it makes the cache")
        self._cache.reset()
        # the last batch is filled up: another size would be another shape, and does not fit the cache
        filled = [*prompts, *[prompts[-1]] * (self.unit - len(prompts))]
        answers = answers_to(self.loaded, encoded(self.loaded, filled), decoding, seed, past_key_values=self._cache)
        return answers[: len(prompts)]
