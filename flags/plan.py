"""Group of flags: what a command would hold in memory, told before anything is loaded or written. No setting of a run."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import Flags

#: How the work is divided over devices (models/footprint/strategies.py has a row for each).
STRATEGIES = ("one", "ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class PlanFlags(Flags):
    """Asked of a command beside its own flags; ``config.parse`` keeps it apart from them, for it makes no other run."""

    heading, general = "Plan", True
    plan: bool = flag(False, "tell parameters and memory by part and the peak of each device; load nothing, write nothing")
    plan_strategy: str = flag("", "with --plan: how the work is divided; empty: as the launcher says (accelerate launch), "
                                  "else one process", choices=("", *STRATEGIES))
    plan_devices: int = flag(0, "with --plan: number of devices; 0: the processes that were launched, else 1", low=0)
    plan_gb: float = flag(0.0, "with --plan: memory of each device in GB (1e9 bytes); 0: what is found here", low=0)
    plan_tokens: int = flag(0, "with --plan: tokens of the longest row, or prompt; 0: --model_max_length, prompts of 256",
                            low=0)

    @property
    def strategy(self) -> str:
        """Empty where the launcher decides."""
        return self.plan_strategy or ("fsdp2" if self.plan_devices > 1 else "")

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.plan:
            found += [f"--{name} {value}: belongs to --plan; add it, or drop this" for name, value in vars(self).items()
                      if name != "plan" and value]
        if self.plan_devices > 1 and self.plan_strategy == "one":
            found.append(f"--plan_devices {self.plan_devices}: --plan_strategy one is one process on one device; give "
                         f"{', '.join(STRATEGIES[1:])}")
        if self.plan_devices == 1 and self.plan_strategy not in ("", "one"):
            found.append(f"--plan_strategy {self.plan_strategy}: divides the work over devices, and --plan_devices is "
                         "1; give 2 or more, or drop one of the two")
        return found
