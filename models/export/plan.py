"""Which tensors an export writes, each from which tensor of the base and with what added: jobs of models/merging."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flags.export import ExportArgs
from models.adapters.changed import Change, ChangedCheckpoint, Observer
from models.checkpoints.configs import section, written
from models.checkpoints.header import TensorInfo
from models.checkpoints.names import layer_of
from models.checkpoints.reader import Checkpoint
from models.export.layouts import MoeLayout, moe_config
from models.export.sources import PROJECTIONS, Changes, Source
from models.merging.merge import DTYPES
from models.merging.plan import DTYPES as NAMES
from models.merging.plan import FLOATS, Job, MergePlan, Piece
from models.operators.parameters import Passthrough

_HEAD = "lm_head.weight"


def dense_plan(source: Source, args: ExportArgs, observer: Observer) -> MergePlan:
    """One plain model: the base with everything in its weights that the run, or what the flags pick of it, adds."""
    view = ChangedCheckpoint.of(source.base, picked(source, args), observer)
    jobs = [_job(name, info, view, args.out_dtype) for name, info in _in_order(source.tensors)]
    if source.head:
        # its weight was the embedding, which stays as it is
        tied = source.embedding
        if tied is None:
            raise ValueError(f"{source.name}: a change of a tied head, and no embedding")
        own = ChangedCheckpoint.of(source.base, {tied.name: source.head}, observer)
        jobs.append(_job(_HEAD, tied, own, args.out_dtype))
    notes = ("the head was the embedding; it gets a weight of its own, for an adapter changes it",) if source.head else ()
    untied = any(job.name == _HEAD for job in jobs)
    return MergePlan(tuple(jobs), notes, None,
                     written(source.config, section(source.config), _dtype(jobs), None, head=untied))


def picked(source: Source, args: ExportArgs) -> Mapping[str, Sequence[Change]]:
    """What a plain model adds to the base: the adapters, or of a MoE one expert, or the experts' average."""
    chosen = [e for e in source.experts if not args.merge_expert or e.name == args.merge_expert]
    changes = Changes({name: list(own) for name, own in source.common.items()})
    for expert in chosen:
        for name, own in expert.changes.items():
            changes.setdefault(name, []).extend(_scaled(change, 1 / len(chosen)) for change in own)
    return changes


def moe_plan(source: Source, layout: MoeLayout, out_dtype: str, observer: Observer | None = None) -> MergePlan:
    """A model of experts: every expert's FFN whole, the routers as they are, all else once."""
    family, file = source.required_family, source.moe_file
    if file is None:
        raise ValueError(f"{source.name}: is no fused MoE")
    common = ChangedCheckpoint.of(source.base, source.common, observer)
    views = [ChangedCheckpoint.of(source.base, expert.changes, observer) for expert in source.experts]
    parts = {getattr(family, name): layout.parts[name] for name in PROJECTIONS}
    ffn = re.compile(rf"{re.escape(family.layers)}\.(\d+)\.{family.ffn}\.({'|'.join(parts)})\.weight")
    jobs = []
    for name, info in _in_order(source.tensors):
        if not (place := ffn.fullmatch(name)):
            jobs.append(_job(name, info, common, out_dtype))
            continue
        layer, part = int(place[1]), parts[place[2]]
        jobs += [_job(layout.expert.format(layer=layer, expert=number, part=part), info, view, out_dtype)
                 for number, view in enumerate(views)]
        # beside the first of a layer's matrices; fp32 whatever the others are: rounded, tokens would go to other experts
        if part == layout.parts["gate"]:
            jobs.append(_job(layout.router.format(layer=layer), source.routers[layer], file, ""))
    experts = [job for job in jobs if job.pieces[0].checkpoint is not file]
    return MergePlan(tuple(jobs), (), None, moe_config(layout, source, _dtype(experts)))


def _job(name: str, info: TensorInfo, checkpoint: Checkpoint, out_dtype: str) -> Job:
    wanted = DTYPES.get(out_dtype, "")
    dtype = wanted if wanted and info.dtype in FLOATS else info.dtype
    return Job(name, dtype, info.shape, None, (Piece(checkpoint, info),), Passthrough(scale=(1.0,)), by_rows=False)


def _scaled(change: Change, factor: float) -> Change:
    return Change(change.a, change.b, change.scale * factor, change.turned, change.first_row)


def _in_order(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """Layer by layer, so that a shard holds whole layers; what stands before them first."""
    def key(item: tuple[str, Any]) -> tuple:
        layer = layer_of(item[0])
        return (layer is not None, layer or 0, item[0])

    return sorted(tensors.items(), key=key)


def _dtype(jobs: Sequence[Job]) -> str | None:
    kinds = {job.dtype for job in jobs if job.dtype in NAMES}
    return NAMES[kinds.pop()] if len(kinds) == 1 else None

