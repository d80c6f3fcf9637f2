"""Back end continuous: transformers' continuous batching over a paged cache; a row that ends makes room for the next prompt.

It has no stop strings: a row whose template ends in a text goes on to its EOS or to the limit, and its answer is cut there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from models.base.attention import attention_of
from models.generation.answers import Answer, Decoding, answer_of, check_lengths, encoded, pad_id, stop_ids
from models.runs import Loaded

# it tells the size of every cache, once a unit
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
#: Prompts of a unit for each row that is decoded at a time: the more, the fewer places stand empty at its end, and the more
#: a kill loses.
ROUNDS = 8
#: Tokens of a page. Prompts share whole pages of what they begin with, a template's system text; transformers' 256 would be
#: longer than most of these, and leave most of the pages of short prompts empty.
_PAGE = 16
#: Tokens of a step, prompts included: a whole step's mask is (tokens, cached tokens of all rows).
_STEP = {"cpu": 512, "cuda": 2048}
#: Seconds between two looks at whether the thread that decodes is still alive.
_LOOK = 1.0


class ContinuousAnswerer:
    """See ``backends.Answerer``; ``ROUNDS`` batches are the unit."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        self.loaded, self.rows, self.unit = loaded, batch_size, ROUNDS * batch_size
        self._longest = 0

    def prepare(self, prompts: Sequence[str], new: int) -> None:
        check_lengths(self.loaded, prompts, new)
        # of all prompts, also of those that are answered already: a resumed command has the same cache
        self._longest = max(map(len, encoded(self.loaded, prompts)), default=0) + new

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
        rows, ends = encoded(self.loaded, prompts), stop_ids(self.loaded)
        settings = GenerationConfig(max_new_tokens=decoding.max_new_tokens, do_sample=decoding.do_sample,
                                    eos_token_id=ends or [-1], pad_token_id=pad_id(self.loaded.tokenizer),
                                    **decoding.sampling)
        torch.manual_seed(seed)
        # torch's fused attention is one of the two that know a paged cache
        with attention_of(self.loaded.model, "sdpa"):
            return [answer_of(ids, ends, self.loaded) for ids in self._decoded(rows, settings, seed)]

    def _decoded(self, rows: list[list[int]], settings: GenerationConfig, seed: int) -> list[list[int]]:
        """New tokens of each row."""
        manager = self.loaded.model.init_continuous_batching(settings, self._cache(seed))
        found: dict[str, list[int]] = {}
        try:
            # before the thread starts: which rows share its first step must not depend on which of the two is faster
            names = manager.add_requests(rows, max_new_tokens=settings.max_new_tokens)
            manager.start()
            while len(found) < len(rows):
                result = manager.get_result(timeout=_LOOK)
                if result is None and not manager.is_running():
                    raise RuntimeError(f"--backend continuous: {manager.background_thread_status.fatal_error}")
                if result is not None and result.error:
                    raise RuntimeError(f"--backend continuous: {result.error}")
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
        finally:
            # also on Ctrl-C: its thread would keep the process alive
            manager.stop(hard_stop=True)
            manager.destroy()
        return [found[name] for name in names]

    def _cache(self, seed: int) -> ContinuousBatchingConfig:
        """A cache for exactly these rows: transformers would take more than half of the memory."""
        # one page more than a row needs: layers with a window share pages out in other sizes
        pages = self.rows * (math.ceil(self._longest / _PAGE) + 1)
        return ContinuousBatchingConfig(
            page_size=_PAGE, num_blocks=pages, max_batch_tokens=max(self.rows, _STEP[self.loaded.device.type]),
            max_requests_per_batch=self.rows, seed=seed % 2**32, drop_unsupported_processors=False,
            # flash attention may be fetched from the hub, which is code; graphs and a second thread's order are not ours
            auto_switch_to_flash=False, use_cuda_graph=False, use_async_batching=False)
