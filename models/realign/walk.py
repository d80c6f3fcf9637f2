"""Task vectors weight by weight through a method and a rule: the largest entries of a whole model, then each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.reader import KINDS
from models.operators.blocks import uniform
from models.operators.selection import Cut, count, find_cuts
from models.realign.formulas import Part, realigned
from models.realign.methods import Row
from models.task_vectors import Model, differing, vector


@dataclass(frozen=True)
class Recipe:
    """A method and a rule with their parameters, and the seed of every draw."""

    method: Row
    p: Any
    rule: Row
    q: Any
    seed: int


@dataclass(frozen=True)
class Inputs:
    """The models of a realignment.

    Args:
        unaligned: the aligned model before its alignment.
        safe: a safety-tuned model.
    """

    aligned: Model
    tasks: tuple[Model, ...]
    unaligned: Model | None = None
    safe: Model | None = None

    @property
    def others(self) -> tuple[Model, ...]:
        return tuple(model for model in (*self.tasks, self.unaligned, self.safe) if model)


@dataclass
class Change:
    """What becomes of one weight: the fused change on the aligned model, what the tasks changed, remarks."""

    name: str
    fused: Tensor
    asked: float
    notes: dict[str, float]


def changes(inputs: Inputs, recipe: Recipe) -> Iterator[Change]:
    """The fused change of every weight that can change, in the order of the aligned checkpoint."""
    names = differing(inputs.others, inputs.aligned)
    cuts = _cuts(recipe.method, recipe.p, lambda: (part.deltas for part in _parts(inputs, names, recipe)), inputs, names)
    edited = lambda: (_edited(part, recipe) for part in _parts(inputs, names, recipe, cuts))  # noqa: E731
    rule_cuts = _cuts(recipe.rule, recipe.q, edited, inputs, names)
    for name, part in zip(names, _parts(inputs, names, recipe, cuts, rule_cuts, edited), strict=True):
        fused = realigned(part, recipe.method, recipe.p, recipe.rule, recipe.q)
        asked = float(sum(part.deltas[1:], part.deltas[0]).double().square().sum())
        yield Change(name, fused, asked, part.notes)


Walk = Callable[[], Iterator[list[Tensor]]]


def _parts(inputs: Inputs, names: list[str], recipe: Recipe, cuts: list[Cut] | None = None,
           rule_cuts: list[Cut] | None = None, edited: Walk | None = None) -> Iterator[Part]:
    """Every weight's part, in order. Cuts over the model are used up on the way; those of a tensor are made here."""
    running, rule_running = ([cut.fresh() for cut in found] if found else None for found in (cuts, rule_cuts))
    vectors = edited() if _by_tensor(recipe.rule, recipe.q) and edited else None
    for name in names:
        info = inputs.aligned.checkpoint.tensors[name]
        found = [vector(task, inputs.aligned, name) for task in inputs.tasks]
        zero = torch.zeros(info.shape)
        deltas = [zero if delta is None else delta.contiguous() for delta in found]
        part = Part(deltas, lambda purpose, which, shape, name=name: uniform(
            recipe.seed, f"{purpose}/{name}", which, 0, prod(shape)).view(shape))
        if inputs.unaligned:
            back = vector(inputs.unaligned, inputs.aligned, name)
            part.alignment = None if back is None else -back
            part.floor = _rounding(inputs.aligned.stored(name), getattr(torch, KINDS[info.dtype][1]))
        if inputs.safe:
            part.safe = vector(inputs.safe, inputs.aligned, name)
        part.cuts = _tensor_cuts(recipe.p.kept, deltas) if _by_tensor(recipe.method, recipe.p) else running
        part.rule_cuts = _tensor_cuts(recipe.q.density, next(vectors)) if vectors else rule_running
        yield part


def _rounding(weight: Tensor, kind: torch.dtype) -> float:
    """About the largest singular value that storing a weight in this type adds: rms x epsilon x (sqrt(out) + sqrt(in))."""
    if weight.dim() != 2:
        return 0.0
    rms = float(weight.norm()) / weight.numel() ** 0.5
    return torch.finfo(kind).eps * rms * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)


def _edited(part: Part, recipe: Recipe) -> list[Tensor]:
    edit = recipe.method.load("edit")
    return edit(part, recipe.p) if edit else part.deltas


def _by_tensor(row: Row, p: Any) -> bool:
    return bool(row.largest) and p.scope == "tensor"


def _tensor_cuts(share: float, tensors: list[Tensor]) -> list[Cut]:
    size = tensors[0].numel()
    return [cut.fresh() for (cut,) in find_cuts(lambda: [tensors], [[count(share, size)]] * len(tensors), size)]


def _cuts(row: Row, p: Any, walk: Walk, inputs: Inputs, names: list[str]) -> list[Cut] | None:
    """A Cut per task over all weights together; None where the row selects nothing, or tensor by tensor."""
    if not row.largest or p.scope == "tensor":
        return None
    total = sum(prod(inputs.aligned.checkpoint.tensors[name].shape) for name in names)
    wanted = [[count(getattr(p, row.largest), total)]] * len(inputs.tasks)
    return [cut for (cut,) in find_cuts(walk, wanted, total)]
