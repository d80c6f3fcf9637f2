"""Models as weights on demand: a checkpoint, or an adapter on one. Task vectors between them, their base checked by hash."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import manifest
from errors import UserError
from models.adapters.files import CONFIG, WEIGHTS, Adapter, read_adapter, transposed
from models.base.folders import TENSORS
from models.base.loading import base_path
from models.checkpoints.fingerprints import fingerprint_like
from models.checkpoints.header import KINDS
from models.checkpoints.matched import matched
from models.checkpoints.reader import Checkpoint
from models.operators.low_rank import Pair, product

log = logging.getLogger(__name__)
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class Model:
    """A model whose weights are read one by one.

    Args:
        name: as the user wrote it.
        folder: of the adapter, or of the checkpoint.
        checkpoint: the weights, or those below the adapter.
        adapter: the change on them; None for a checkpoint.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def stored(self, name: str) -> Tensor:
        """The checkpoint's tensor, fp32, without the adapter's change."""
        info = self.checkpoint.tensors[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        return self.checkpoint.read(info, 0, prod(info.shape), buffer).float().view(info.shape)

    def pair(self, name: str) -> Pair | None:
        """The adapter's factors for a tensor; None where it has none."""
        module = name.removesuffix(".weight")
        return self.adapter.modules.get(module) if self.adapter and module != name else None

    def change(self, name: str) -> Tensor | None:
        """B A for a tensor; None where the adapter has none."""
        pair, adapter = self.pair(name), self.adapter
        if pair is None or adapter is None:
            return None
        # fan_in_fan_out layers (Conv1D) store their weight as (in, out)
        turned = transposed(adapter.config, self.checkpoint.config, name.removesuffix(".weight"))
        return product(pair).T if turned else product(pair)

    def weight(self, name: str) -> Tensor:
        """The model's weight, fp32."""
        change = self.change(name)
        return self.stored(name) if change is None else self.stored(name) + change


def vector(model: Model, other: Model, name: str) -> Tensor | None:
    """model - other of one weight, fp32; None where nothing can differ.

    On one checkpoint it is the difference of the adapters' changes, exact, without the rounding of a large sum.

    Raises:
        UserError: it holds NaN or infinity.
    """
    if model.checkpoint.folder == other.checkpoint.folder:
        mine, its = model.change(name), other.change(name)
        if mine is None:
            if its is None:
                return None
            delta = -its
        else:
            delta = mine if its is None else mine - its
    else:
        delta = model.weight(name) - other.weight(name)
    # a sum is finite only if every term is: one pass and no mask of the tensor's size
    if not torch.isfinite(delta.sum()):
        raise UserError(f"{model.name}: {name} holds NaN or infinity; train or save it again")
    return delta


def differing(models: Sequence[Model], other: Model) -> list[str]:
    """Names of the float tensors, in order, in which any of the models can differ from ``other``."""
    names = other.checkpoint.tensors
    wanted: set[str] = set()
    for model in models:
        # of another checkpoint every tensor may differ; on the same one only what an adapter trains can
        if model.checkpoint.folder != other.checkpoint.folder:
            return [name for name, info in names.items() if info.dtype in FLOATS]
        for adapter in filter(None, (model.adapter, other.adapter)):
            wanted |= {f"{module}.weight" for module in adapter.modules}
    return [name for name in names if name in wanted]


def place(name: str, args: Any, flag: str) -> Path:
    """The folder of a run, a local folder, the embedded model or a hub name.

    Raises:
        UserError: there is none.
    """
    # a run goes before a folder of the same name: names without a slash mean runs everywhere
    run = args.results / "outputs" / name
    if "/" not in name and run.is_dir():
        return run.resolve()
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return folder.resolve()
    try:
        return base_path(name, args.cache_dir, use=TENSORS)
    except UserError as error:
        # the loader speaks of the flag that most commands have; this one may have another
        raise UserError(*(p.replace("--model_name_or_path", flag) for p in error.problems)) from None


def open_model(name: str, args: Any, flag: str, stack: ExitStack, base: Checkpoint | None = None) -> Model:
    """Open a model's files; of an adapter, ``base`` below it (by default --model_name_or_path).

    Raises:
        UserError: nothing there, damaged files, an adapter that does not fit its checkpoint.
    """
    folder = place(name, args, flag)
    if not (folder / CONFIG).is_file():
        return Model(name, folder, stack.enter_context(Checkpoint.open(folder)).plain())
    adapter = read_adapter(folder, name)
    if base is None:
        base = stack.enter_context(Checkpoint.open(base_path(args.model_name_or_path, args.cache_dir, use=TENSORS))).plain()
    model = Model(name, folder, base, adapter)
    # checked here and not while reading: before any work, and with the flag's name
    for module, (a, b) in adapter.modules.items():
        info = base.tensors.get(f"{module}.weight")
        shape = (a.shape[1], b.shape[0]) if transposed(adapter.config, base.config, module) else (b.shape[0], a.shape[1])
        if info is None or tuple(info.shape) != shape:
            raise UserError(f"{flag} {name}: its module {module} is {list(shape)}, but the base has "
                            f"{list(info.shape) if info else 'no such weight'}; give its base with --model_name_or_path")
    return model


def provenance(model: Model, aligned: Model, flag: str, trust: bool) -> list[str]:
    """What speaks against ``model`` having been tuned from ``aligned``, by the hashes in its manifest; empty: nothing.

    Args:
        trust: whether a model without a record passes; one with another hash never does.
    """
    inputs = manifest.read(model.folder).get("inputs", {}) if (model.folder / manifest.MANIFEST).is_file() else {}
    want = {"base": ""}
    if aligned.adapter:
        want["init_adapter"] = manifest.sha256(aligned.folder / WEIGHTS)
    what = {"base": f"the checkpoint {aligned.checkpoint.folder}", "init_adapter": f"the adapter {aligned.name}"}
    problems = []
    if not aligned.adapter and inputs.get("init_adapter"):
        problems.append(f"{flag} {model.name}: went on with an adapter (its manifest says so), which belongs to the aligned "
                        "model; name that adapter's run with --aligned")
    for key, value in want.items():
        have = inputs.get(key)
        if key == "base":
            # a record of an earlier version is compared in that version's way
            value = fingerprint_like(have, aligned.checkpoint.folder)
        # a wrong record is never trusted, only a missing one
        if have == value or (have is None and trust):
            continue
        problems.append(
            f"{flag} {model.name}: " + (f"was tuned from something else than {what[key]} (fingerprint {have[:12]}, not "
                                        f"{value[:12]}); give the aligned model that it was tuned from" if have else
                                        f"nothing records that it was tuned from {what[key]}; train it with "
                                        "align_basemodel.py, or add --trust_base if you know it"))
    return problems


def misfits(aligned: Model, named: Sequence[tuple[Model, str]]) -> list[str]:
    """What keeps models from being subtracted from the aligned one: architectures, names or shapes that differ.

    Their checkpoints come under the aligned one's names, in place: see ``models.checkpoints.matched``.

    Args:
        named: models, each with the flag that names it.
    """
    own = aligned.checkpoint
    apart = [model for model, _ in named if model.checkpoint.folder != own.folder]
    if apart:
        try:
            views, notes = matched({aligned.name: own, **{model.name: model.checkpoint for model in apart}})
        except UserError as error:
            return list(error.problems)
        # adapters lie on the aligned model's checkpoint, and go on doing so
        for model in (aligned, *(model for model, _ in named)):
            model.checkpoint = views[aligned.name if model.checkpoint.folder == own.folder else model.name]
        for note in notes:
            log.info("note: %s", note)
    return [problem for model, flag in named for problem in same_tensors(model, aligned, flag)]


def same_tensors(model: Model, aligned: Model, flag: str) -> list[str]:
    """What keeps two checkpoints from being subtracted: names or shapes that differ, told in a sentence."""
    if model.checkpoint.folder == aligned.checkpoint.folder:
        return []
    mine, its = model.checkpoint.tensors, aligned.checkpoint.tensors
    # one example and the count: architectures differ in all tensors or in the vocabulary's two
    odd = [name for name in sorted(mine.keys() | its.keys())
           if name not in mine or name not in its or mine[name].shape != its[name].shape]
    if not odd:
        return []
    shown = [f"{list(t[odd[0]].shape) if odd[0] in t else 'absent'}" for t in (mine, its)]
    return [f"{flag} {model.name}: {len(odd)} tensors do not fit the aligned model (e.g. {odd[0]}: {shown[0]}, but "
            f"{shown[1]} there); give models of one architecture and vocabulary"]


def raw(model: Model, name: str) -> Tensor:
    """A tensor's values as stored."""
    info = model.checkpoint.tensors[name]
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    return model.checkpoint.read(info, 0, info.nbytes // KINDS[info.dtype][0], buffer).view(info.shape)
