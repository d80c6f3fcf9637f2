"""--backend: what a back end is, and the table of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PretrainedConfig

from errors import UserError
from models import runs as loading
from models.base.families import FAMILIES
from models.base.loading import skeleton
from models.generation.answers import Answer, Decoding
from models.generation.continuous import ContinuousAnswerer
from models.generation.hf import HfAnswerer
from models.generation.static import StaticAnswerer
from models.generation.vllm_engine import VllmBackend
from models.runs import Loaded, located


class Answerer(Protocol):
    """A run, opened to answer."""

    #: The run; its model may be without weights where another engine computes.
    loaded: Loaded
    #: Prompts that are given to ``answer`` at a time: what a kill loses, and what a resumed command draws again as it was.
    unit: int

    def prepare(self, prompts: Sequence[str], new: int) -> None:
        """Told all rendered prompts of the command and the most new tokens, before the first of them is answered.

        Raises:
            UserError: prompts beyond what the model reads.
        """

    def answer(self, prompts: Sequence[str], decoding: Decoding, seed: int) -> list[Answer]:
        """Answer a unit of rendered prompts, or the rest; ``seed`` is of this unit alone."""


class Backend(Protocol):
    """A way to decode; made once for a command."""

    def problems(self, runs: Sequence[str]) -> list[str]:
        """Why it cannot answer with these runs ("" is the base); asked for all of a command, before any is opened."""

    def open(self, run: str) -> Answerer:
        """Load a run."""


class LocalBackend:
    """Decoding by transformers, with a model that ``models.runs.load_run`` loads.

    Args:
        refuses: what of a model's configuration stands in the way, empty for nothing; None: it takes every model.
    """

    def __init__(self, args: Any, answerer: Callable[[Loaded, int], Answerer],
                 refuses: Callable[[PretrainedConfig], str] | None = None) -> None:
        self.args, self._answerer, self._refuses = args, answerer, refuses

    def problems(self, runs: Sequence[str]) -> list[str]:
        found: list[str] = []
        refuses = self._refuses
        if refuses is None:
            return found
        for run in runs:
            try:
                config = skeleton(located(run, self.args).base).config
            except UserError as error:
                found += error.problems
                continue
            if why := refuses(config):
                found.append(f"--backend {self.args.backend}: {run or 'the base'}: {why}; use --backend hf")
        return list(dict.fromkeys(found))

    def open(self, run: str) -> Answerer:
        return self._answerer(loading.load_run(run, self.args), self.args.batch_size)


def _unknown(config: PretrainedConfig) -> str:
    if config.model_type in FAMILIES:
        return ""
    return (f"model type '{config.model_type}' is of no family that its answers were compared for (known: "
            f"{', '.join(sorted(FAMILIES))})")


def _not_paged(config: PretrainedConfig) -> str:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return (f"attention of this {config.model_type} caps its scores (attn_logit_softcapping), which attention over a "
                "paged cache leaves out without a word")
    return _unknown(config)


#: Name -> the back end for a command's flags; ``auto`` is not among them (``resolved_backend``).
BACKENDS: dict[str, Callable[[Any], Backend]] = {
    "hf": lambda args: LocalBackend(args, HfAnswerer),
    "static": lambda args: LocalBackend(args, StaticAnswerer, _unknown),
    "continuous": lambda args: LocalBackend(args, ContinuousAnswerer, _not_paged),
    "vllm": VllmBackend,
}


def backend_of(args: Any) -> Backend:
    """The back end that --backend names."""
    return BACKENDS[resolved_backend(args)](args)


def resolved_backend(args: Any) -> str:
    """The name that --backend stands for: what identifies answers records it."""
    # on a GPU too, until scripts/gpu_check.sh has measured the others: what is not known to be faster decides nothing
    return "hf" if args.backend == "auto" else args.backend
