"""A base that stays in memory, in the dtype and on the device where it answers, with one low-rank change after the other.

The changed matrices alone are read again, each summed in fp32 and rounded once: a sweep over weights loads its base once,
and no model stands in memory in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.adapters.apply import add_to, change_of, untie_head
from models.base.loading import load_base, settled
from models.base.stored import StoredWeights, stored_weights
from models.operators.low_rank import Pair

log = logging.getLogger(__name__)


class ResidentBase:
    """One base model; what ``plain`` and ``changed`` return is the same model, valid until the next call.

    Args:
        base: its folder.
    """

    def __init__(self, base: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self._model: PreTrainedModel | None = None
        self._stored: StoredWeights | None = None
        self._changed: set[str] = set()

    def serves(self, base: Path, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is this base, held like this."""
        return (self.base, self.dtype, self.device) == (base, dtype, device)

    def plain(self) -> PreTrainedModel:
        """The base itself."""
        self._restore(set())
        return self._loaded()

    @torch.no_grad()
    def changed(self, pairs: Mapping[str, Pair], scales: Mapping[str, float] | None = None) -> PreTrainedModel:
        """The base with B A, times its scale, on each named module; ``check_fit`` has seen to it that all fit.

        Args:
            scales: of each module; none: 1.
        """
        model = self._loaded()
        self._restore(set(pairs))
        if self._stored is None or not self._stored.hold(pairs):
            return self._summed_whole(pairs, scales)
        untie_head(model, pairs)
        for name, pair in pairs.items():
            module = model.get_submodule(name)
            exact = self._stored.read(name)
            if exact is None:
                return self._summed_whole(pairs, scales)
            self._changed.add(name)
            exact += change_of(module, pair, None if scales is None else scales[name], exact)
            module.weight.copy_(exact)
        return model

    def release(self) -> None:
        """Let go of the model; the next call loads it again."""
        if self._stored is not None:
            self._stored.close()
        self._model = self._stored = None
        self._changed = set()

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            self._model = load_base(self.base, self.dtype, self.device)
            self._stored = stored_weights(self._model, self.base)
        return self._model

    @torch.no_grad()
    def _restore(self, keep: set[str]) -> None:
        for name in self._changed - keep:
            # read before it was changed, so it is there
            self._model.get_submodule(name).weight.copy_(self._stored.read(name))
        self._changed &= keep

    def _summed_whole(self, pairs: Mapping[str, Pair], scales: Mapping[str, float] | None) -> PreTrainedModel:
        """Weights that transformers joins or turns as it loads them are summed in a whole fp32 model on the CPU."""
        log.info("%s: its weights are not stored as they are used; summed in fp32 on the CPU, which takes twice the memory",
                 self.base)
        self.release()
        model = load_base(self.base, torch.float32, torch.device("cpu"))
        add_to(model, pairs, scales)
        return settled(model, self.dtype, self.device)
