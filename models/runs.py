"""A trained run, whatever it is, as a model that answers: the one place that knows every kind of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data.prompts import Template, template
from flags.mixture import Parts
from models.adapters.apply import check_fit
from models.adapters.files import read_adapter
from models.adapters.mixture import load_mix
from models.adapters.resident import ResidentBase
from models.base import spread
from models.base.folders import check_folder
from models.base.loading import base_path, check_base, load_tokenizer
from models.base.placement import set_up_torch
from models.moe.files import load_moe
from models.run_folders import ADAPTER, MOE, parts_of, run_folder


@dataclass
class Loaded:
    """A model ready to answer, with its tokenizer and template; ``name`` is the run's, "base" for the base itself."""

    model: PreTrainedModel
    tokenizer: Any
    template: Template
    name: str
    device: torch.device


@dataclass(frozen=True)
class Located:
    """Where a run lies and what it is.

    Args:
        kind: "base", "full" (a whole model), "adapter", "moe" or "sum" (a weighted sum of adapters).
        folder: its own; None for the base and for a sum.
        base: the folder of the model below it; a full model's own.
        parts: (run, weight) pairs of a sum.
    """

    kind: str
    folder: Path | None
    base: Path
    parts: Parts = ()

    def tokenizer(self) -> Any:
        """The run's own tokenizer, or its base's: an adapter may have been saved without one."""
        own = self.folder if self.folder is not None and (self.folder / "tokenizer_config.json").is_file() else self.base
        return load_tokenizer(own, self.base)

    @property
    def own_folder(self) -> Path:
        """``folder``; a ValueError for the base and a sum, which have none."""
        if self.folder is None:
            raise ValueError(f"a {self.kind} has no folder of its own")
        return self.folder


def located(run: str, args: Any) -> Located:
    """Find a run ("" is the base) and its base; headers are read, no weights.

    Raises:
        UserError: no such run, no such base, or a folder that is no model.
    """
    # commands without --checkpoint_number ask for the finished run
    parts = parts_of(run) if run else ()
    folder = run_folder(args.results, run, getattr(args, "checkpoint_number", -1)) if run and not parts else None
    if folder is None:
        return Located("sum" if parts else "base", None, base_path(args.model_name_or_path, args.cache_dir), parts)
    # a folder is what the file in it says: of a full model neither is there
    kind = "moe" if (folder / MOE).is_file() else "adapter" if (folder / ADAPTER).is_file() else "full"
    if kind == "full":
        check_folder(folder, f"run '{run}'")
        return Located(kind, folder, folder)
    return Located(kind, folder, base_path(args.model_name_or_path, args.cache_dir))


class RunLoader:
    """Loads one run after the other; base, adapters and their sums share one base in memory.

    So each load ends the last: what came before has no model any more, for it would no longer be what its name says.
    """

    def __init__(self) -> None:
        self._resident: ResidentBase | None = None
        self._last: Loaded | None = None

    def load(self, run: str, args: Any) -> Loaded:
        """Base model (run ""), adapter, fused MoE, full model, or weighted sum of adapters, in the compute dtype.

        Adapters are summed with the base in fp32 before the cast, so that bfloat16 rounds the sum once and not the small
        change.

        Raises:
            UserError: no such run, or it was trained on another base than the one given.
        """
        spread.check(args)
        device, dtype = set_up_torch(args)
        place = located(run, args)
        # before the weights: what is wrong with it shows at once
        tokenizer = place.tokenizer()
        shape = template(args.template, tokenizer)
        if self._last:
            self._last.model = None
        if place.kind == "moe":
            # its own base, without a second one beside it
            self.release()
            model = load_moe(place.own_folder, args, dtype, device)
        elif place.kind == "sum":
            model = load_mix(args.results, place.parts, self._base(place.base, dtype, device, args))
        elif place.kind == "adapter":
            model = load_adapter(place.own_folder, self._base(place.base, dtype, device, args))
        else:
            model = self._base(place.base, dtype, device, args).plain()
        # of a model on several devices the first one takes the tokens
        self._last = Loaded(model, tokenizer, shape, run or "base",
                            spread.device_of(model) if spread.wanted(args) else device)
        return self._last

    def release(self) -> None:
        """Let go of what is in memory; the last ``Loaded`` has no model any more."""
        if self._last:
            self._last.model = None
        if self._resident:
            self._resident.release()
        self._resident = self._last = None

    def _base(self, base: Path, dtype: torch.dtype, device: torch.device, args: Any) -> ResidentBase:
        held = base, dtype, device, spread.wanted(args)
        if self._resident is None or not self._resident.serves(*held):
            # before the next is loaded: two need not fit
            self.release()
            self._resident = ResidentBase(*held)
        return self._resident


#: Loaders of the ``keeping_base`` that the process is in; all of them are the first one.
_KEPT: list[RunLoader] = []


@contextmanager
def keeping_base() -> Iterator[None]:
    """Within it ``load_run`` keeps the base from one run to the next; one within another shares its base."""
    _KEPT.append(_KEPT[0] if _KEPT else RunLoader())
    try:
        yield
    finally:
        last = _KEPT.pop()
        if not _KEPT:
            last.release()


def release_base() -> None:
    """Let go of a kept base, before something else needs the memory."""
    if _KEPT:
        _KEPT[0].release()


def load_run(run: str, args: Any) -> Loaded:
    """One run; see ``RunLoader.load``. Within ``keeping_base`` the one before it has no model any more."""
    return (_KEPT[0] if _KEPT else RunLoader()).load(run, args)


def load_adapter(folder: Path, resident: ResidentBase) -> PreTrainedModel:
    """The base with an adapter in its weights.

    Raises:
        UserError: it is no plain LoRA, was trained on another base, or a part of it fits nowhere.
    """
    # unscaled: the scale is applied where PEFT applies it
    adapter = read_adapter(folder, scaled=False)
    check_base(folder, resident.base)
    check_fit([adapter], resident.shapes())
    return resident.changed(adapter.modules, adapter.scales)
