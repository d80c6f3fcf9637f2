"""Bytes that a mask's training holds, before it starts (spec section 4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from models.mask.settings import Rule

if TYPE_CHECKING:
    # and torch with it, for which a plan need not wait
    from models.mask.slots import Spec


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose.

    Args:
        masked: entries under a mask.
        logits: how many logits there are.
        held: purpose -> bytes held all the time.
        passing: bytes that come and go tensor by tensor: a gradient, and the mask that is drawn again.
    """

    masked: int
    logits: int
    held: dict[str, int]
    passing: int

    @property
    def per_scalar(self) -> float:
        """Bytes held per masked entry, the rest of the model left out."""
        return sum(size for name, size in self.held.items() if name != "frozen weights") / max(self.masked, 1)

    @property
    def total(self) -> int:
        """Bytes at the highest point, activations left out."""
        return sum(self.held.values()) + self.passing

    def lines(self) -> list[str]:
        """For a person."""
        gib = 2**30
        purposes = ", ".join(f"{name} {size / gib:.3f}" for name, size in self.held.items() if size)
        return [f"memory plan: {self.masked} masked entries, {self.logits} logits; GiB: {purposes}; tensor by tensor "
                f"{self.passing / gib:.3f}; in all {self.total / gib:.3f} beside activations",
                f"memory plan: {self.per_scalar:.1f} bytes per masked entry"]


def memory_plan(specs: Sequence[Spec], rule: Rule, tasks: int, storage: int, logit: int, parameters: int, frozen: int,
                states: int = 2) -> Plan:
    """The plan of a run.

    Args:
        storage, logit, frozen: bytes per live weight, per logit, per weight that is not touched.
        parameters: of the whole model.
        states: optimiser moments per logit.
    """
    sizes = [prod(spec.shape) for spec in specs]
    masked = [prod(spec.shape) for spec in specs if spec.units is not None]
    logits = sum(spec.units.size for spec in specs if spec.units is not None)
    # masked factors come beside the model's weights, masked weights are some of them
    replaced = sum(sizes) if specs and specs[0].part == "weight" else 0
    most_units = max((spec.units.size for spec in specs if spec.units is not None), default=0)
    found = Sizes(sum(sizes), sum(masked), logits, replaced, max(masked, default=0), most_units)
    return bytes_of(found, rule, tasks, storage, logit, parameters, frozen, states)


@dataclass(frozen=True)
class Sizes:
    """Numbers of a mask's tensors.

    Args:
        entries: that receive task vectors; ``masked`` of them under a mask.
        replaced: entries that are some of the model's own weights, not beside them.
        largest, units: entries, and logits, of the largest masked tensor.
    """

    entries: int
    masked: int
    logits: int
    replaced: int
    largest: int
    units: int


def bytes_of(sizes: Sizes, rule: Rule, tasks: int, storage: int, logit: int, parameters: int, frozen: int,
             states: int = 2) -> Plan:
    """The plan for these sizes; arguments as in ``memory_plan``."""
    live, logits = sizes.entries * storage, sizes.logits
    # a linear rule's task vectors are summed once and for all (rules.combined)
    held = {"live weights": live, "base": live, "task vectors": live * (1 if rule.linear else tasks),
            "logits": logits * logit, "their gradient": logits * logit, "optimiser": logits * logit * states,
            "frozen weights": max(parameters - sizes.replaced, 0) * frozen}
    # one tensor at a time: its gradient and G D (fp32) by entry, mask and slope (fp32) by unit
    passing = sizes.largest * (storage + 4) + sizes.units * (4 + 4)
    return Plan(sizes.masked, logits, held, passing)
