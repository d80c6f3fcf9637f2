"""The tensors that live in a masked model, and what a draw of their mask is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from models.base.parted import first_row, is_parted, own_part
from models.mask.slots import Spec
from models.mask.units import Units


@dataclass(frozen=True)
class Draw:
    """Which mask a forward pass sees.

    Args:
        key: of the noise, e.g. seed, step and micro-step.
        temperature: of the soft mask, and of the slope.
        hard: zeros and ones in the forward pass, the soft mask's slope in the backward one (straight through).
        mirrored: 1 - u instead of u.
        trained: whether logits count; False: all 0, the published reference's random mask.
        expected: no draw: the mask's mean sigmoid(s), as ``readout`` gives it; of a key "SEED|readout|rule" what realign
            writes with that seed.
    """

    key: str
    temperature: float = 0.5
    hard: bool = False
    mirrored: bool = False
    trained: bool = True
    expected: bool = False


@dataclass
class Slot:
    """A tensor that lives in the model; of one that FSDP2 parts this process has some rows, and no unit lies in two.

    Args:
        live: the model's parameter; what the bank writes.
        base: theta_s, of the live type; the rows that lie here.
        deltas: theta_i - theta_s, or their weighted sum where the rule is linear; the same rows.
        logits_index: place among the bank's logits, which sets it; None: not masked.
        counts: entries per unit that lies here, (units,); None: one each.
    """

    spec: Spec
    live: nn.Parameter
    base: Tensor
    deltas: list[Tensor]
    logits_index: int | None
    counts: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """What lies here of the live parameter."""
        return own_part(self.live)

    @cached_property
    def units(self) -> Units | None:
        """Of the rows that lie here."""
        units = self.spec.units
        return replace(units, shape=tuple(self.weights.shape)) if units and is_parted(self.live) else units

    @property
    def required_units(self) -> Units:
        """``units``; a ValueError where the tensor is not masked."""
        if self.units is None:
            raise ValueError(f"{self.spec.name}: is not masked")
        return self.units

    @property
    def first(self) -> int:
        """The place in the whole tensor of the first entry that lies here."""
        return first_row(self.live) * self.spec.matrix[1]

    @property
    def first_unit(self) -> int:
        """The number of the first unit that lies here."""
        return first_row(self.live) * self.spec.required_units.grid[1]

    @property
    def entries(self) -> float:
        """How many entries of the whole tensor its logits govern."""
        units = self.spec.required_units
        return float(units.size if units.index is not None else prod(self.spec.shape))

    def counts_as(self, dtype: torch.dtype, block: slice = slice(None)) -> Tensor | float:
        """Entries of each unit of a block of logits; 1.0: one each."""
        return 1.0 if self.counts is None else self.counts[block].to(dtype)
