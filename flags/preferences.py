"""Group of flags: learning from preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config import flag
from flags.base import Flags
from flags.data import SAFE_TASKS


@dataclass(frozen=True)
class DpoFlags(Flags):
    """Direct preference optimisation, of an adapter or of a mask."""

    heading = "DPO"
    beta: float = flag(0.1, "DPO beta", low=0)


@dataclass(frozen=True)
class PairFlags(Flags):
    """Which preference pairs are trained on."""

    heading = "DPO"
    pair_contrast_share: float = flag(0.0, "share of the safety pairs that are contrasts (data/sets/contrasts.yaml): a "
                                           "harmful request better refused, beside a harmless one better answered", low=0)

    @classmethod
    def idle(cls, values: dict[str, Any]) -> dict[str, str]:
        task = values.get("task_name")
        lacking = {} if task is None or task in SAFE_TASKS else {
            "pair_contrast_share": f"--task_name {task} has no safety pairs to mix into; drop it, or train safety, mix"}
        return {**super().idle(values), **lacking}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pair_contrast_share >= 1:
            found.append(f"--pair_contrast_share {self.pair_contrast_share}: a share of the safety pairs; below 1")
        return found
