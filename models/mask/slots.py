"""The tensors that a mask works on: of whole weights, of LoRA factors, or of the singular components of LoRA changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from errors import UserError
from models.adapters.files import in_order
from models.mask.settings import Settings
from models.mask.units import Units, units_of
from models.operators.low_rank import Pair
from models.task_vectors import Model, differing, vector

_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|embed_positions|wte|wpe|word_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_NORM = re.compile(r"(^|\.)[^.]*norm[^.]*\.|(^|\.)ln_[^.]*\.")


@dataclass(frozen=True)
class Spec:
    """One tensor that receives the masked task vectors.

    Args:
        name: of the tensor: a weight's, or MODULE.lora_A, MODULE.lora_B.
        weight: the checkpoint's tensor that changes.
        part: "weight", "A", "B" or "rank" (columns of B, one unit per singular component).
        units: what shares a logit; None: excluded, its task vector stays whole.
    """

    name: str
    weight: str
    part: str
    shape: tuple[int, ...]
    units: Units | None

    @property
    def matrix(self) -> tuple[int, int]:
        return (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")


def kind_of(name: str) -> str:
    """"embeddings", "head", "norms" or "matrix"."""
    for kind, pattern in (("embeddings", _EMBEDDINGS), ("head", _HEAD), ("norms", _NORM)):
        if pattern.search(name):
            return kind
    return "matrix"


def plan(settings: Settings, aligned: Model, tasks: Sequence[Model]) -> list[Spec]:
    """Every tensor in which a task differs from the aligned model, with its units.

    Raises:
        UserError: factors or rank components of models that have none, or of shapes that differ; nothing to mask.
    """
    config = aligned.checkpoint.config
    if settings.space == "weights" and settings.granularity != "rank":
        specs = []
        for name in differing(tasks, aligned):
            shape = tuple(aligned.checkpoint.tensors[name].shape)
            free = kind_of(name) in settings.exclude
            specs.append(Spec(name, name, "weight", shape, None if free else
                              units_of(name, shape, settings.granularity, settings.block, config)))
    else:
        _check_adapters(aligned, tasks)
        modules = in_order([m.adapter for m in (*tasks, aligned) if m.adapter])
        if settings.granularity == "rank":
            specs = [_rank_spec(module, aligned, tasks) for module in modules]
        else:
            specs = [spec for module in modules for spec in _factor_specs(module, settings, aligned, tasks)]
        specs = [replace(spec, units=None) if kind_of(spec.weight) in settings.exclude else spec for spec in specs]
    if not any(spec.units is not None and spec.units.size for spec in specs):
        raise UserError("nothing to mask: the tasks differ from the aligned model in no tensor that is not excluded; check "
                        "--aligned, --tasks and --mask_exclude")
    return specs


def _check_adapters(aligned: Model, tasks: Sequence[Model]) -> None:
    """Factors can be masked where every task is a plain LoRA on the aligned model's checkpoint."""
    problems = []
    for task in tasks:
        if task.adapter is None or task.checkpoint.folder != aligned.checkpoint.folder:
            problems.append(f"--tasks {task.name}: no LoRA adapter on the aligned model's base; use --mask_on weights and "
                            "another granularity than rank")
        elif task.adapter.config.get("fan_in_fan_out"):
            problems.append(f"--tasks {task.name}: fan_in_fan_out layers; use --mask_on weights")
    if problems:
        raise UserError(*problems)


def factors(model: Model, module: str, like: Pair) -> Pair:
    """The (A, B) of a module; zeros where the model has none."""
    found = model.adapter.modules.get(module) if model.adapter else None
    return found if found is not None else (torch.zeros_like(like[0]), torch.zeros_like(like[1]))


def _some(module: str, models: Sequence[Model]) -> Pair:
    return next(m.adapter.modules[module] for m in models if m.adapter and module in m.adapter.modules)


def _factor_specs(module: str, settings: Settings, aligned: Model, tasks: Sequence[Model]) -> list[Spec]:
    config = aligned.checkpoint.config
    like = _some(module, (*tasks, aligned))
    odd = [m.name for m in (aligned, *tasks) if [f.shape for f in factors(m, module, like)] != [f.shape for f in like]]
    if odd:
        raise UserError(f"{module}: rank differs between {', '.join(odd)} and the others; factors can be masked where tasks "
                        "went on with the aligned adapter (--init_adapter), or use --mask_on weights")
    specs = []
    for part, tensor in zip("AB", like, strict=True):
        shape = tuple(tensor.shape)
        specs.append(Spec(f"{module}.lora_{part}", f"{module}.weight", part, shape,
                          units_of(module, shape, settings.granularity, settings.block, config, part)))
    return specs


def components(module: str, aligned: Model, tasks: Sequence[Model]) -> list[Pair]:
    """Each task's B_i A_i - B_s A_s by its singular components, largest first: (V (R, in), U (out, R)), S split evenly.

    R is common to the tasks, so that one index means one place in each task's spectrum.
    """
    like = _some(module, (*tasks, aligned))
    found = []
    for task in tasks:
        pairs = [p for m, sign in ((task, 1), (aligned, -1)) if m.adapter and module in m.adapter.modules
                 for p in [(m.adapter.modules[module][0], sign * m.adapter.modules[module][1])]]
        if not pairs:
            pairs = [(torch.zeros_like(like[0]), torch.zeros_like(like[1]))]
        a, b = torch.cat([a for a, _ in pairs]).double(), torch.cat([b for _, b in pairs], 1).double()
        left, upper = torch.linalg.qr(b)
        right, lower = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        root = s.sqrt()
        found.append((root[:, None] * (vh @ right.T), (left @ u) * root))
    rank = max(a.shape[0] for a, _ in found)
    return [(_padded(a, rank, 0).float(), _padded(b, rank, 1).float()) for a, b in found]


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def aligned_factors(module: str, aligned: Model) -> Pair | None:
    return aligned.adapter.modules.get(module) if aligned.adapter else None


def _rank_spec(module: str, aligned: Model, tasks: Sequence[Model]) -> Spec:
    own = aligned_factors(module, aligned)
    front = own[0].shape[0] if own else 0
    out, inner = (_some(module, (*tasks, aligned))[i].shape[j] for i, j in ((1, 0), (0, 1)))
    ranks = []
    for task in tasks:
        there = aligned_factors(module, task)
        # as QR and SVD of the stacked factors leave it
        stacked = (there[0].shape[0] if there else 0) + front
        ranks.append(min(stacked or _some(module, (*tasks, aligned))[0].shape[0], out, inner))
    rank = max(ranks)
    index = (*[-1] * front, *(list(range(rank)) * len(tasks)))
    shape = (out, len(index))
    return Spec(f"{module}.lora_B", f"{module}.weight", "rank", shape, Units(shape, out, 1, index))


def tensors_of(spec: Spec, aligned: Model, tasks: Sequence[Model], parts: Sequence[Pair] | None = None,
               ) -> tuple[Tensor, list[Tensor]]:
    """(theta_s, [theta_i - theta_s]) of a spec, fp32.

    Args:
        parts: for ``rank``: what ``components`` gave, when it is at hand.
    """
    if spec.part == "weight":
        base = aligned.weight(spec.weight)
        found = [vector(task, aligned, spec.weight) for task in tasks]
        return base, [torch.zeros_like(base) if d is None else d for d in found]
    if spec.part == "rank":
        own = aligned_factors(spec.module, aligned)
        parts = components(spec.module, aligned, tasks) if parts is None else parts
        rank, front = parts[0][0].shape[0], own[0].shape[0] if own else 0
        base = torch.zeros(spec.shape)
        if own:
            base[:, :front] = own[1]
        deltas = []
        for i, (_, b) in enumerate(parts):
            delta = torch.zeros(spec.shape)
            delta[:, front + i * rank:front + (i + 1) * rank] = b
            deltas.append(delta)
        return base, deltas
    side = "AB".index(spec.part)
    like = _some(spec.module, (*tasks, aligned))
    base = factors(aligned, spec.module, like)[side].clone()
    return base, [factors(task, spec.module, like)[side] - base for task in tasks]


def down_factor(spec: Spec, aligned: Model, parts: Sequence[Pair]) -> Tensor:
    """The A that goes with a ``rank`` spec's B: the aligned model's rows, then each task's components, (R, in)."""
    own = aligned_factors(spec.module, aligned)
    return torch.cat([*([own[0]] if own else []), *(a for a, _ in parts)])


def check_units(specs: Sequence[Spec], settings: Settings) -> None:
    """Refuse a mask that its own rescaling undoes: one unit per tensor, divided by itself.

    Raises:
        UserError: with the flags to change.
    """
    masked = [spec for spec in specs if spec.units is not None]
    if settings.rescale in ("tensor", "detached") and all(spec.units.size == 1 for spec in masked):
        raise UserError(f"--rescale {settings.rescale}: with --granularity {settings.granularity} each tensor has one "
                        "logit, and its mask divided by its mean is always 1; use --rescale none or global")
