"""Back end vllm: vLLM's engine, where it is installed, on whole models (an exported MoE is one) and on LoRA adapters.

vLLM rounds and batches in its own ways. Its answers to one prompt may differ from ours where two tokens are about as likely.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from data.prompts import template
from errors import UserError
from models.adapters.apply import check_fit
from models.adapters.files import VLLM_RANKS, read_adapter
from models.base import processes
from models.base.loading import check_base, keep_ends, skeleton
from models.base.placement import resolved_dtype, set_up_torch
from models.generation.answers import Answer, Decoding, answer_of, check_lengths, encoded, stop_ids
from models.runs import Loaded, Located, located

#: Prompts of a unit for each row that is decoded at a time, as in ``continuous``.
ROUNDS = 8
#: Kind of run -> what to do with it instead.
_REFUSED = {
    "moe": "vLLM has no such layer; export it first (python models/fuse.py export {run} --layout mixtral) and answer with "
           "that run",
    "sum": "vLLM serves one adapter at a time; write the sum first (python models/fuse.py adapters) and answer with that "
           "run",
}


def installed() -> bool:
    """Whether vLLM can be imported; it is not, for that takes long."""
    return importlib.util.find_spec("vllm") is not None


class VllmBackend:
    """See ``backends.Backend``. Runs on one base share its engine; another base ends it, for two need not fit."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self._base: Path | None = None
        self._engine: Any = None
        #: The largest of all adapters of the command (``problems`` reads them): an engine is made for a rank.
        self._rank = 0
        #: Adapter -> the number by which the engine tells it from others.
        self._numbers: dict[str, int] = {}

    def problems(self, runs: Sequence[str]) -> list[str]:
        if not installed():
            return ["--backend vllm: the package vllm is not installed here; pip install vllm (in an environment of its "
                    "own: it pins another torch), or use --backend hf"]
        found = []
        if processes.count() > 1:
            found.append(f"--backend vllm: spreads its work over GPUs itself, and {processes.count()} processes were "
                         "started; start it without torchrun or accelerate launch, or use --backend hf")
        for run in runs:
            try:
                place = located(run, self.args)
                if place.kind in _REFUSED:
                    found.append(f"--backend vllm: run '{run}': {_REFUSED[place.kind].format(run=run)}, or use --backend hf")
                elif place.kind == "adapter":
                    self._rank = max(self._rank, _rank(run, place))
            except UserError as error:
                found += error.problems
        return list(dict.fromkeys(found))

    def open(self, run: str) -> VllmAnswerer:
        device, _ = set_up_torch(self.args)
        place = located(run, self.args)
        tokenizer = place.tokenizer()
        # names and settings alone: the weights are the engine's
        model = skeleton(place.base)
        if (place.base / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(place.base)
        keep_ends(model)
        loaded = Loaded(model, tokenizer, template(self.args.template, tokenizer), run or "base", device)
        return VllmAnswerer(loaded, self._engine_for(place), self.args.batch_size, self._request(run, place))

    def _request(self, run: str, place: Located) -> Any:
        """What tells the engine which adapter to apply; None for a whole model."""
        if place.kind != "adapter":
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(run, self._numbers.setdefault(run, len(self._numbers) + 1), str(place.folder))

    def _engine_for(self, place: Located) -> Any:
        if place.base != self._base:
            # it tells its makers how it is used unless told not to
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
            from vllm import LLM

            self._engine = None
            gc.collect()
            fitting = next(rank for rank in VLLM_RANKS if rank >= self._rank)
            lora = {"enable_lora": True, "max_lora_rank": fitting} if self._rank else {}
            # generation_config: nothing is inherited from the checkpoint's own
            # the base's tokenizer: all that the engine does with it is to look for the text at which an answer stops
            self._engine = LLM(model=str(place.base), tokenizer=str(place.base), dtype=resolved_dtype(self.args),
                               seed=self.args.seed, max_num_seqs=self.args.batch_size, trust_remote_code=False,
                               generation_config="vllm", **lora)
            self._base = place.base
        return self._engine


class VllmAnswerer:
    """See ``backends.Answerer``; ``ROUNDS`` batches are the unit."""

    def __init__(self, loaded: Loaded, engine: Any, batch_size: int, request: Any) -> None:
        self.loaded, self.unit = loaded, ROUNDS * batch_size
        self._engine, self._request = engine, request

    def prepare(self, prompts: Sequence[str], new: int) -> None:
        check_lengths(self.loaded, prompts, new)

    def answer(self, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
        from vllm import SamplingParams

        ends, stop = stop_ids(self.loaded), self.loaded.template.stop
        draws = decoding.do_sample
        # a seed for each prompt: vLLM then draws the same whatever else it answers at the time
        settings = [SamplingParams(
            temperature=decoding.temperature if draws else 0.0, top_p=decoding.top_p if draws else 1.0,
            seed=seed * 1009 + place if draws else None, max_tokens=decoding.max_new_tokens, stop_token_ids=ends,
            stop=[stop] if stop else None) for place in range(len(prompts))]
        inputs = [{"prompt_token_ids": row} for row in encoded(self.loaded, prompts)]
        found = self._engine.generate(inputs, settings, lora_request=self._request, use_tqdm=False)
        return [self._read(output.outputs[0], ends) for output in found]

    def _read(self, output: Any, ends: Sequence[int]) -> Answer:
        answer = answer_of(list(output.token_ids), ends, self.loaded)
        # the token that ends an answer need not be among its tokens
        return Answer(answer.text, "stop" if output.finish_reason == "stop" else answer.finish)


def _rank(run: str, place: Located) -> int:
    """The largest rank of an adapter that vLLM applies as we do.

    Raises:
        UserError: it belongs to another base, fits it nowhere, or has a scale or a rank that vLLM does not know.
    """
    adapter = read_adapter(place.own_folder, scaled=False)
    check_base(place.own_folder, place.base)
    check_fit([adapter], skeleton(place.base))
    rank = max(a.shape[0] for a, _ in adapter.modules.values())
    odd = ("has another scale in some of its modules (alpha_pattern, rank_pattern)" if len(set(adapter.scales.values())) > 1
           else f"has rank {rank}, and vLLM serves ranks up to {VLLM_RANKS[-1]}" if rank > VLLM_RANKS[-1] else "")
    if odd:
        raise UserError(f"--backend vllm: run '{run}': {odd}; write it into its base (python models/fuse.py export {run} "
                        "--layout dense) and answer with that run, or use --backend hf")
    return rank
