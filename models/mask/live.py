"""The tensors that live in a masked model, and what a draw of their mask is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.mask.slots import Spec


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
    """A tensor that lives in the model.

    Args:
        live: the model's parameter; what the bank writes.
        base: theta_s, of the live type.
        deltas: theta_i - theta_s, or their weighted sum where the rule is linear.
        logits_index: place among the bank's logits, which sets it; None: not masked.
        counts: entries per unit, (units,); None: one each.
    """

    spec: Spec
    live: nn.Parameter
    base: Tensor
    deltas: list[Tensor]
    logits_index: int | None
    counts: Tensor | None = None

    @property
    def entries(self) -> float:
        """How many entries of the tensor its logits govern."""
        return float(self.spec.units.size if self.counts is None else self.counts.sum())

    def counts_as(self, dtype: torch.dtype, block: slice = slice(None)) -> Tensor | float:
        """Entries of each unit of a block of logits; 1.0: one each."""
        return 1.0 if self.counts is None else self.counts[block].to(dtype)
