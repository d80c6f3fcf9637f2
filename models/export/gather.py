"""A training's checkpoint as a plain folder: a model, an adapter, a fused MoE that other commands open."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch

import manifest
from errors import UserError
from flags.export import GatherArgs
from models.checkpoints import parts
from models.checkpoints.header import KINDS
from models.checkpoints.writer import Writer, plan_layout

#: Of a checkpoint, what its training alone reads.
STATE = "trainer_state.json"
_TRAINING = (STATE, "resume_state.json", "progress.json", "scaler.json", "trainable.safetensors", "optimizer.safetensors",
             manifest.MANIFEST)
#: What a folder that can be opened holds one of.
_ARTEFACTS = ("adapter_model.safetensors", "moe.safetensors", "mask.safetensors", "model.safetensors",
              "model.safetensors.index.json")
#: How the trainer calls the model within its loss.
_PREFIX = "lm."
#: Bytes of tensors that are read at a time.
_GROUP = 1 << 30


def gather(args: GatherArgs) -> str:
    """Write ``results/outputs/NAME`` from a checkpoint's folder, whole or in parts; returns what to say.

    Raises:
        UserError: no checkpoint, or one whose parts are not all there.
    """
    folder = Path(args.folder).expanduser()
    if not (folder / STATE).is_file():
        raise UserError(f"FOLDER {args.folder}: is no checkpoint of a training ({STATE} is missing); give one of "
                        f"{args.results / 'checkpoints'}/RUN/checkpoint-N")
    whole = any((folder / name).is_file() for name in _ARTEFACTS)
    if not whole and not ((folder / parts.WEIGHTS).is_dir() and (folder / "config.json").is_file()):
        raise UserError(f"FOLDER {args.folder}: holds neither {', '.join(_ARTEFACTS)} nor a config.json with "
                        f"{parts.WEIGHTS}; give a checkpoint that align_basemodel.py wrote")
    target = args.results / "outputs" / args.name
    settings = asdict(args) | {"folder": str(folder.resolve()), "state": manifest.sha256(folder / STATE)}
    if not args.overwrite and manifest.finished(target, settings):
        return f"{target}: already there"
    with manifest.writing(target, "gather", settings, overwrite=args.overwrite) as run:
        if not whole:
            _write_weights(folder / parts.WEIGHTS, run.folder, round(args.shard_gb * 1e9))
        for file in folder.iterdir():
            if file.is_file() and file.name not in _TRAINING and not file.name.startswith("rng_"):
                shutil.copy2(file, run.folder / file.name)
        if (folder / manifest.MANIFEST).is_file():
            run.inputs.update(manifest.read(folder).get("inputs") or {})
    return f"{target}: {folder.name} of {folder.parent.name}"


def _write_weights(source: Path, folder: Path, shard_bytes: int) -> None:
    """The parts of a model put together under the names that transformers gives them, a group of tensors at a time."""
    found = parts.stored(source)
    kinds = {getattr(torch, kind): name for name, (_, kind) in KINDS.items() if hasattr(torch, kind)}
    planned = [(name.removeprefix(_PREFIX), kinds[dtype], tuple(shape)) for name, (shape, dtype) in found.items()]
    layout = plan_layout(planned, shard_bytes)
    writer = Writer(folder, layout)
    try:
        group: dict[str, torch.Tensor] = {}
        for i, (name, (shape, dtype)) in enumerate(found.items(), 1):
            group[name] = torch.empty(shape, dtype=dtype)
            if i == len(found) or sum(prod(t.shape) * t.element_size() for t in group.values()) >= _GROUP:
                parts.load(source, group)
                for read, tensor in group.items():
                    writer.write(read.removeprefix(_PREFIX), 0, tensor)
                group = {}
        writer.finish()
    finally:
        writer.close()
