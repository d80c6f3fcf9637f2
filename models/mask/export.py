"""A trained mask written into its models: task vectors as dense changes, or an adapter where they stay of low rank.

    with ExitStack() as stack:
        mask, aligned, tasks = open_mask(folder, args, stack)
        for name, change in masked_deltas(folder, "hard", seed=0, models=(aligned, tasks)):
            weight = aligned.weight(name) + change
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from models.mask.concrete import mean_of, scale_for
from models.mask.files import Mask, check_models, read_mask
from models.mask.readout import read_out
from models.mask.rescale import RESCALINGS
from models.mask.rules import combined, effective, ties_thresholds
from models.mask.settings import Readout, Settings, parse_readout
from models.mask.slots import Spec, aligned_factors, components, down_factor, plan, tensors_of
from models.operators.low_rank import Pair
from models.task_vectors import Model, open_model


def open_mask(folder: Path, args: Any, stack: ExitStack, aligned: str | None = None,
              tasks: Sequence[str] | None = None) -> tuple[Mask, Model, list[Model]]:
    """A mask with the models that it was trained on, each verified by hash.

    Args:
        args: a command's flags (results, cache_dir, model_name_or_path).
        aligned, tasks: other places of the same models; None: where mask.json says they were.

    Raises:
        UserError: no mask, a model that is gone, or another one in its place.
    """
    mask = read_mask(folder)
    known = _open(mask.aligned, aligned, args, stack, None)
    found = [_open(fact, given, args, stack, known)
             for fact, given in zip(mask.tasks, tasks or [None] * len(mask.tasks), strict=False)]
    if tasks is not None and len(tasks) != len(mask.tasks):
        raise UserError(f"{folder}: was trained for {len(mask.tasks)} tasks, but {len(tasks)} are given")
    check_models(mask, known, found, str(folder))
    return mask, known, found


def _open(fact: dict[str, Any], given: str | None, args: Any, stack: ExitStack, aligned: Model | None) -> Model:
    name = given
    if name is None:
        # by name first: a results folder may have been moved
        run = args.results / "outputs" / fact["name"]
        name = fact["name"] if "/" not in fact["name"] and run.is_dir() else fact["folder"]
        if aligned is None and "/" in fact["name"] and not Path(name).is_dir():
            name = args.model_name_or_path  # an aligned checkpoint that was moved; its hash tells whether this is it
    flag = "--tasks" if aligned else "--aligned"
    return open_model(name, args, flag, stack, aligned.checkpoint if aligned else None)


def masked_deltas(mask_dir: Path, readout: str | Readout, seed: int, models: tuple[Model, Sequence[Model]],
                  mask: Mask | None = None) -> Iterator[tuple[str, Tensor]]:
    """(weight name, fused and masked change against the aligned model, fp32): theta = theta_aligned + change.

    Weights that no task changes are left out. LoRA factors come back as the change of B A.

    Args:
        readout: see ``settings.parse_readout``; with ``seed`` it determines the result.
        models: (aligned, tasks), as ``open_mask`` gives them.
        mask: when it was read already.
    """
    aligned, tasks = models
    done: dict[str, Pair] = {}
    for part in _parts(mask_dir, readout, seed, aligned, tasks, mask):
        if part.spec.part == "weight":
            yield part.spec.weight, part.fused
            continue
        if part.spec.part == "A":
            done["A"] = part.base + part.fused
            continue
        down = part.down if part.spec.part == "rank" else done.pop("A")
        change = (part.base + part.fused) @ down
        own = aligned_factors(part.spec.module, aligned)
        yield part.spec.weight, change if own is None else change - own[1] @ own[0]


def masked_adapter(mask_dir: Path, readout: str | Readout, seed: int, models: tuple[Model, Sequence[Model]],
                   mask: Mask | None = None) -> dict[str, Pair] | None:
    """The realigned model's adapter on the base, module -> (A, B) of scale 1, exact; None where masks act on weights.

    Rank masks keep the components whose mask is not 0.
    """
    aligned, tasks = models
    mask = mask or read_mask(mask_dir)
    if mask.settings.space == "weights" and mask.settings.granularity != "rank":
        return None
    found: dict[str, Pair] = {}
    waiting: Tensor | None = None
    for part in _parts(mask_dir, readout, seed, aligned, tasks, mask):
        if part.spec.part == "A":
            waiting = part.base + part.fused
            continue
        up = part.base + part.fused
        down = part.down if part.spec.part == "rank" else waiting
        if part.spec.part == "rank":
            used = up.abs().sum(0) > 0
            used[0] = True  # an adapter has at least rank 1
            up, down = up[:, used], down[used]
        found[part.spec.module] = (down.contiguous(), up.contiguous())
    return found


@dataclass
class _Part:
    spec: Spec
    base: Tensor
    fused: Tensor
    down: Tensor | None


def _parts(mask_dir: Path, readout: str | Readout, seed: int, aligned: Model, tasks: Sequence[Model], mask: Mask | None,
           ) -> Iterator[_Part]:
    """Every tensor's theta_s and masked, merged task vectors."""
    mask = mask or read_mask(mask_dir)
    settings = mask.settings
    readout = parse_readout(readout) if isinstance(readout, str) else readout
    specs = plan(settings, aligned, tasks)
    wanted = {s.name: s.units.size for s in specs if s.units is not None}
    have = {name: value.numel() for name, value in mask.logits.items()}
    if wanted != have:
        odd = sorted(set(wanted.items()) ^ set(have.items()))[0]
        raise UserError(f"{mask_dir}: its logits do not fit these models (e.g. {odd[0]}); give the models it was trained on")
    logits = {s.name: mask.logits[s.name] for s in specs if s.units is not None}
    scales = _scales(logits, specs, settings, readout, seed)

    def walk() -> Iterator[tuple[Spec, Tensor, list[Tensor], Tensor, Tensor | None]]:
        masks = read_out(logits, settings, readout, seed)
        for spec in specs:
            parts = components(spec.module, aligned, tasks) if spec.part == "rank" else None
            base, deltas = tensors_of(spec, aligned, tasks, parts)
            drawn = torch.ones(1, 1) if spec.units is None else spec.units.expand(next(masks)[1]) * scales[spec.name]
            yield spec, base, deltas, drawn, None if parts is None else down_factor(spec, aligned, parts)

    thresholds = None
    if settings.rule.name == "ties":
        thresholds = ties_thresholds(
            settings.rule, lambda: ([(d.view(s.matrix) * m).reshape(-1) for d in deltas] for s, _, deltas, m, _ in walk()),
            len(tasks), sum(prod(spec.shape) for spec in specs))
    for spec, base, deltas, drawn, down in walk():
        flat = [d.view(spec.matrix) for d in combined(settings.rule, deltas)]
        change = effective(settings.rule, flat, drawn.expand(flat[0].shape), thresholds,
                           f"{seed}|readout|rule|{spec.name}", 0)
        yield _Part(spec, base, (change * drawn).view(base.shape), down)


def _scales(logits: dict[str, Tensor], specs: Sequence[Spec], settings: Settings, readout: Readout, seed: int,
            ) -> dict[str, float]:
    """What each tensor's mask is multiplied by; a mask that is zero throughout stays zero."""
    rescaling = RESCALINGS[settings.rescale]
    if rescaling.measured is None:
        return dict.fromkeys(logits, 1.0)
    counts = {s.name: s.units.counts for s in specs if s.units is not None}
    source = Readout("expected") if rescaling.expected else readout
    sizes = {name: float(logits[name].numel() if c is None else c.sum()) for name, c in counts.items()}
    means = {name: mean_of(values, counts[name]) for name, values in read_out(logits, settings, source, seed)}
    if rescaling.joint:
        whole = sum(sizes.values())
        return dict.fromkeys(logits, scale_for(sum(means[n] * sizes[n] for n in means) / whole))
    return {name: scale_for(mean) for name, mean in means.items()}
