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
    aligned_model = _open(mask.aligned, aligned, args, stack, None)
    places: Sequence[str | None] = tasks or [None] * len(mask.tasks)
    task_models = [_open(facts, given, args, stack, aligned_model)
                   for facts, given in zip(mask.tasks, places, strict=False)]
    # after opening: a model that does not exist is the plainer mistake
    if tasks is not None and len(tasks) != len(mask.tasks):
        raise UserError(f"{folder}: was trained for {len(mask.tasks)} tasks, but {len(tasks)} are given")
    check_models(mask, aligned_model, task_models, str(folder))
    return mask, aligned_model, task_models


def _open(facts: dict[str, Any], given: str | None, args: Any, stack: ExitStack, aligned: Model | None) -> Model:
    """A model of mask.json, from where it is said to be (``given``) or was; ``aligned`` None: it is the aligned one."""
    name = given
    if name is None:
        # by name first: a results folder may have been moved
        run = args.results / "outputs" / facts["name"]
        name = facts["name"] if "/" not in facts["name"] and run.is_dir() else facts["folder"]
        if aligned is None and "/" in facts["name"] and not Path(name).is_dir():
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
    mask = mask or read_mask(mask_dir)
    masked_tensors = _masked_tensors(mask, str(mask_dir), readout, seed, aligned, tasks)
    if not _of_factors(mask):
        yield from ((tensor.spec.weight, tensor.fused) for tensor in masked_tensors)
        return
    for module, (down, up) in _factor_pairs(masked_tensors):
        # masks lie on A and B, so that the change of the weight is a difference of products, not a product of differences
        change, own = up @ down, aligned_factors(module, aligned)
        yield f"{module}.weight", change if own is None else change - own[1] @ own[0]


def masked_adapter(mask_dir: Path, readout: str | Readout, seed: int, models: tuple[Model, Sequence[Model]],
                   mask: Mask | None = None) -> dict[str, Pair] | None:
    """The realigned model's adapter on the base, module -> (A, B) of scale 1, exact; None where masks act on weights.

    Rank masks keep the components whose mask is not 0.
    """
    aligned, tasks = models
    mask = mask or read_mask(mask_dir)
    if not _of_factors(mask):
        return None
    adapter: dict[str, Pair] = {}
    for module, (down, up) in _factor_pairs(_masked_tensors(mask, str(mask_dir), readout, seed, aligned, tasks)):
        if mask.settings.granularity == "rank":
            used = up.abs().sum(0) > 0
            used[0] = True  # an adapter has at least rank 1
            up, down = up[:, used], down[used]
        adapter[module] = (down.contiguous(), up.contiguous())
    return adapter


def _of_factors(mask: Mask) -> bool:
    """Whether the mask lies on LoRA factors, so that its result has a low rank."""
    return mask.settings.space != "weights" or mask.settings.granularity == "rank"


@dataclass
class _MaskedTensor:
    """A tensor with a mask on it.

    Args:
        base: theta_s, of the spec's shape, as ``fused`` is.
        fused: the masked, merged task vectors: the result is base + fused.
        down: for a ``rank`` spec: the A (width, in) that goes with it.
    """

    spec: Spec
    base: Tensor
    fused: Tensor
    down: Tensor | None


def _factor_pairs(tensors: Iterator[_MaskedTensor]) -> Iterator[tuple[str, Pair]]:
    """(module, (A (r, in), B (out, r))) of masked factors; the plan puts a module's A right before its B."""
    down: Tensor | None = None
    for tensor in tensors:
        if tensor.spec.part == "A":
            down = tensor.base + tensor.fused
            continue
        yield tensor.spec.module, (down if tensor.down is None else tensor.down, tensor.base + tensor.fused)


def _masked_tensors(mask: Mask, where: str, readout: str | Readout, seed: int, aligned: Model, tasks: Sequence[Model],
                    ) -> Iterator[_MaskedTensor]:
    """Every tensor's theta_s and masked, merged task vectors, one at a time.

    Raises:
        UserError: the mask has logits for other tensors than these models'.
    """
    settings = mask.settings
    readout = parse_readout(readout) if isinstance(readout, str) else readout
    specs = plan(settings, aligned, tasks)
    needed_sizes = {spec.name: spec.units.size for spec in specs if spec.units is not None}
    sizes = {name: value.numel() for name, value in mask.logits.items()}
    if needed_sizes != sizes:
        odd = sorted(set(needed_sizes.items()) ^ set(sizes.items()))[0]
        raise UserError(f"{where}: its logits do not fit these models (e.g. {odd[0]}); give the models it was trained on")
    # in the specs' order, in which the masks are read out below
    logits = {name: mask.logits[name] for name in needed_sizes}
    scales = _scales(logits, specs, settings, readout, seed)

    def walk() -> Iterator[tuple[Spec, Tensor, list[Tensor], Tensor, Tensor | None]]:
        """(spec, theta_s, task vectors, rescaled mask (rows, columns) or broadcastable, A of a rank spec), spec by spec."""
        masks = read_out(logits, settings, readout, seed)
        for spec in specs:
            parts = components(spec.module, aligned, tasks) if spec.part == "rank" else None
            base, deltas = tensors_of(spec, aligned, tasks, parts)
            values = torch.ones(1, 1) if spec.units is None else spec.units.expand(next(masks)[1]) * scales[spec.name]
            yield spec, base, deltas, values, None if parts is None else down_factor(spec, aligned, parts)

    def masked_vectors() -> Iterator[list[Tensor]]:
        for spec, _, deltas, values, _ in walk():
            yield [(delta.view(spec.matrix) * values).reshape(-1) for delta in deltas]

    thresholds = None
    if settings.rule.name == "ties":
        # a walk of its own: TIES cuts over all tensors, which are never held at once
        thresholds = ties_thresholds(settings.rule, masked_vectors, len(tasks), sum(prod(spec.shape) for spec in specs))
    for spec, base, deltas, values, down in walk():
        matrices = [delta.view(spec.matrix) for delta in combined(settings.rule, deltas)]
        change = effective(settings.rule, matrices, values.expand(matrices[0].shape), thresholds,
                           f"{seed}|readout|rule|{spec.name}", 0)
        yield _MaskedTensor(spec, base, (change * values).view(base.shape), down)


def _scales(logits: dict[str, Tensor], specs: Sequence[Spec], settings: Settings, readout: Readout, seed: int,
            ) -> dict[str, float]:
    """What each tensor's mask is multiplied by; a mask that is zero throughout stays zero."""
    rescaling = RESCALINGS[settings.rescale]
    if rescaling.measured is None:
        return dict.fromkeys(logits, 1.0)
    counts = {spec.name: spec.units.counts for spec in specs if spec.units is not None}
    measured = Readout("expected") if rescaling.expected else readout
    means = {name: mean_of(values, counts[name]) for name, values in read_out(logits, settings, measured, seed)}
    if rescaling.joint:
        entries = {name: float(logits[name].numel() if c is None else c.sum()) for name, c in counts.items()}
        total = sum(mean * entries[name] for name, mean in means.items())
        return dict.fromkeys(logits, scale_for(total / sum(entries.values())))
    return {name: scale_for(mean) for name, mean in means.items()}
