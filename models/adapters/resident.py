"""A base that stays in memory, in the dtype and on the device where it answers, with one low-rank change after the other.

The changed matrices alone are summed anew, each in fp32 and rounded once: a sweep over weights loads its base once, and no
model stands in memory in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.adapters.apply import add_to, change_of, untie_head
from models.base.loading import load_base, settled, skeleton
from models.base.stored import StoredWeights, keeps, stored_weights
from models.operators.low_rank import Pair

log = logging.getLogger(__name__)


class ResidentBase:
    """One base model; what ``plain`` and ``changed`` return is the same model, valid until the next call.

    Args:
        base: its folder.
        spread_out: over all GPUs (``models/base/spread.py``) instead of ``device``.
    """

    def __init__(self, base: Path, dtype: torch.dtype, device: torch.device, spread_out: bool = False) -> None:
        self.base, self.dtype, self.device, self.spread_out = base, dtype, device, spread_out
        self._model: PreTrainedModel | None = None
        self._shapes: PreTrainedModel | None = None
        self._stored: StoredWeights | None = None
        #: Matrices as they were, of modules that the files do not hold, or that need not be read twice.
        self._kept: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    def serves(self, base: Path, dtype: torch.dtype, device: torch.device, spread_out: bool = False) -> bool:
        """Whether it is this base, held like this."""
        return (self.base, self.dtype, self.device, self.spread_out) == (base, dtype, device, spread_out)

    def shapes(self) -> PreTrainedModel:
        """The base without its weights, made once for all changes."""
        if self._shapes is None:
            self._shapes = skeleton(self.base)
        return self._shapes

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
        if not self._readable(pairs):
            return self._summed_whole(pairs, scales)
        untie_head(model, pairs)
        for name, pair in pairs.items():
            module = model.get_submodule(name)
            own = self._own(name)
            if own is None:
                return self._summed_whole(pairs, scales)
            self._changed.add(name)
            # a sum of its own: what is kept must stay as it was
            exact = own.to(torch.float32, copy=True)
            exact += change_of(module, pair, None if scales is None else scales[name], exact)
            module.weight.copy_(exact)
        return model

    def release(self) -> None:
        """Let go of the model; the next call loads it again."""
        if self._stored is not None:
            self._stored.close()
        self._model = self._stored = self._shapes = None
        self._kept, self._changed = {}, set()

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            self._model = load_base(self.base, self.dtype, self.device, self.spread_out)
            self._stored = stored_weights(self._model, self.base)
        return self._model

    def _readable(self, names: Iterable[str]) -> bool:
        """Whether every module's own matrix can be had: from the files, or from a model that holds them unrounded."""
        return self._stored is not None and (self._stored.hold(names) or self._stored.exact(self.dtype))

    def _own(self, name: str) -> Tensor | None:
        """A module's matrix before any change, where it lies; None where only a whole model in fp32 has it unrounded."""
        if name in self._kept:
            return self._kept[name]
        weight, stored = self._loaded().get_submodule(name).weight, self._stored
        if stored is None:
            return None
        own = stored.read(name) if stored.hold([name]) else None
        if own is None and stored.exact(self.dtype):
            # transformers joins or turns it as it loads: the model itself is all that holds it, not yet changed
            own = self._kept[name] = weight.detach().clone()
        elif own is not None and keeps(weight.device, own.nbytes, self._held(weight.device)):
            self._kept[name] = own
        return own

    def _held(self, device: torch.device) -> int:
        return sum(own.nbytes for own in self._kept.values() if own.device == device)

    @torch.no_grad()
    def _restore(self, keep: set[str]) -> None:
        for name in self._changed - keep:
            # had before it was changed, so it is there
            self._loaded().get_submodule(name).weight.copy_(self._own(name))
        self._changed &= keep

    def _summed_whole(self, pairs: Mapping[str, Pair], scales: Mapping[str, float] | None) -> PreTrainedModel:
        """Weights that transformers joins or turns, and rounds, as it loads them are summed in a whole fp32 model."""
        log.info("%s: its weights are not stored as they are used, and wider; summed in fp32 on the CPU, which takes twice "
                 "the memory; stored in --dtype they are summed in place", self.base)
        self.release()
        model = load_base(self.base, torch.float32, torch.device("cpu"))
        add_to(model, pairs, scales)
        return settled(model, self.dtype, self.device, self.spread_out)
