"""Task vectors weight by weight through a method and a rule, in as few passes over the models as the two need.

A pass reads one weight of every model at a time, so that memory holds one weight whatever the models' sizes:

    1, 2   where the method keeps the largest entries of the whole model: count high bits, then low bits
    3, 4   where the rule does: the same, on the task vectors that the method left
    last   edit, merge and finish every weight

Whole-model cuts are used up from weight to weight in the checkpoint's order, hence every pass starts from fresh ones. Cuts
of one tensor (``scope=tensor``) need no pass of their own: they are made when their weight comes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.reader import KINDS
from models.operators.noise import uniform
from models.operators.selection import MagnitudeCut, Walk, count, find_cuts
from models.realign.formulas import WeightInputs, edited, merged
from models.realign.methods import Row
from models.task_vectors import Model, differing, vector

#: A cut per task over all weights together; None where nothing is selected, or tensor by tensor.
Cuts = list[MagnitudeCut] | None


@dataclass(frozen=True)
class Realignment:
    """A method and a rule with their parameters, and the seed of every draw."""

    method: Row
    parameters: Any
    rule: Row
    rule_parameters: Any
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
    """What becomes of one weight: the fused change on the aligned model, what the tasks changed, remarks.

    Args:
        asked: squared norm of the sum of the task vectors.
    """

    name: str
    fused: Tensor
    asked: float
    notes: dict[str, float]


def changes(inputs: Inputs, realignment: Realignment) -> Iterator[Change]:
    """The fused change of every weight that can change, in the order of the aligned checkpoint."""
    passes = Passes(inputs, realignment, differing(inputs.others, inputs.aligned))
    cuts = passes.cuts_of_the_model(realignment.method, realignment.parameters, passes.task_vectors)
    rule_cuts = passes.cuts_of_the_model(realignment.rule, realignment.rule_parameters, partial(passes.edited_vectors, cuts))
    yield from passes.fused_changes(cuts, rule_cuts)


@dataclass(frozen=True)
class Passes:
    """The passes over the weights of one realignment, each of which reads every model once.

    Args:
        names: the weights that can change, in the order of the aligned checkpoint.
    """

    inputs: Inputs
    realignment: Realignment
    names: list[str]

    def task_vectors(self) -> Iterator[list[Tensor]]:
        """Every weight's task vectors: what the method selects from."""
        for name in self.names:
            yield self._deltas(name)

    def edited_vectors(self, cuts: Cuts) -> Iterator[list[Tensor]]:
        """Every weight's task vectors as the method leaves them: what the rule selects from."""
        cuts = _fresh(cuts)
        for name in self.names:
            weight = WeightInputs(self._deltas(name), partial(self._draw, name))
            yield self._edited(weight, cuts)

    def fused_changes(self, cuts: Cuts, rule_cuts: Cuts) -> Iterator[Change]:
        """The last pass: every weight through method and rule."""
        realignment, cuts, rule_cuts = self.realignment, _fresh(cuts), _fresh(rule_cuts)
        for name in self.names:
            weight = WeightInputs(self._deltas(name), partial(self._draw, name))
            self._add_references(weight, name)
            asked = float(sum(weight.deltas[1:], weight.deltas[0]).double().square().sum())
            vectors = self._edited(weight, cuts)
            # the rule selects from what the method left, not from what the tasks brought
            weight.rule_cuts = _cuts_here(realignment.rule, realignment.rule_parameters, vectors, rule_cuts)
            fused = merged(vectors, weight, realignment.method, realignment.parameters, realignment.rule,
                           realignment.rule_parameters)
            yield Change(name, fused, asked, weight.notes)

    def cuts_of_the_model(self, row: Row, parameters: Any, walk: Walk) -> Cuts:
        """A cut per task over all weights together, in two passes of ``walk``."""
        if not row.largest or _by_tensor(row, parameters):
            return None
        # weights that an adapter leaves alone count as zeros, as long as another task changes them
        total = sum(prod(self._info(name).shape) for name in self.names)
        wanted = [[count(parameters.density, total)]] * len(self.inputs.tasks)
        return [cut for (cut,) in find_cuts(walk, wanted, total)]

    def _edited(self, weight: WeightInputs, running: Cuts) -> list[Tensor]:
        method, parameters = self.realignment.method, self.realignment.parameters
        weight.cuts = _cuts_here(method, parameters, weight.deltas, running)
        return edited(weight, method, parameters)

    def _info(self, name: str) -> Any:
        return self.inputs.aligned.checkpoint.tensors[name]

    def _deltas(self, name: str) -> list[Tensor]:
        """task - aligned of one weight, per task; zeros where an adapter leaves the weight alone."""
        deltas = [vector(task, self.inputs.aligned, name) for task in self.inputs.tasks]
        zero = torch.zeros(self._info(name).shape)
        # contiguous: a cut counts its ties by flat index, and reads the bits in place
        return [zero if delta is None else delta.contiguous() for delta in deltas]

    def _add_references(self, weight: WeightInputs, name: str) -> None:
        """What only the finish of a method looks at: the way back to the unaligned model, and the safety-tuned one."""
        aligned, unaligned, safe = self.inputs.aligned, self.inputs.unaligned, self.inputs.safe
        if unaligned:
            back = vector(unaligned, aligned, name)
            # vector() is told from the other side
            weight.alignment = None if back is None else -back
            weight.floor = _rounding(aligned.stored(name), getattr(torch, KINDS[self._info(name).dtype][1]))
        if safe:
            weight.safe = vector(safe, aligned, name)

    def _draw(self, name: str, purpose: str, which: int, shape: tuple[int, ...]) -> Tensor:
        # the purpose is part of the key: mask, edit and rule must not share draws
        return uniform(self.realignment.seed, f"{purpose}/{name}", which, 0, prod(shape)).view(shape)


def _fresh(cuts: Cuts) -> Cuts:
    return [cut.fresh() for cut in cuts] if cuts else None


def _by_tensor(row: Row, parameters: Any) -> bool:
    return row.largest and parameters.scope == "tensor"


def _cuts_here(row: Row, parameters: Any, tensors: Sequence[Tensor], running: Cuts) -> Cuts:
    """The cuts that one weight meets: its own with ``scope=tensor``, else those that run through the model."""
    if not _by_tensor(row, parameters):
        return running
    size = tensors[0].numel()
    wanted = [[count(parameters.density, size)]] * len(tensors)
    return [cut.fresh() for (cut,) in find_cuts(lambda: [tensors], wanted, size)]


def _rounding(weight: Tensor, kind: torch.dtype) -> float:
    """About the largest singular value that storing a weight in this type adds: rms x epsilon x (sqrt(out) + sqrt(in)).

    That of a random matrix with entries of this size (Davidson & Szarek 2001); weights of other shapes have none.
    """
    if weight.dim() != 2:
        return 0.0
    rms = float(weight.norm()) / weight.numel() ** 0.5
    return torch.finfo(kind).eps * rms * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)
