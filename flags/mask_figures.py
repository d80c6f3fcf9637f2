"""Flags of evaluator/mask_figures.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import BaseModelFlags, ResultsFlags, name_problems


@dataclass(frozen=True)
class MaskFiguresArgs(BaseModelFlags, ResultsFlags):
    """Look into trained masks: what they keep by layer and module, how far they agree, how tasks overlap.

    python evaluator/mask_figures.py --masks mask_english
    python evaluator/mask_figures.py --masks m_seed1,m_seed2,m_seed3 --run_name seeds
    """

    heading, general = "Masks", False
    masks: str = flag("", "runs of trained masks, commas; two or more of one shape are compared")
    readout: str = flag("top:0.5", "what counts as kept when masks are compared")
    overlap: bool = flag(True, "measure the overlap of the tasks, which reads their weights")
    run_name: str = flag("masks", "name of the report under results/masks")

    @property
    def mask_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.masks.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if not self.mask_names:
            found.append("--masks: name the runs of trained masks, separated by commas")
        if len(set(self.mask_names)) < len(self.mask_names):
            found.append(f"--masks {self.masks}: the same mask twice; give it once")
        return found
