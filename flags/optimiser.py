"""Groups of flags: steps, batches and learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from config import flag
from flags.base import Flags


@dataclass(frozen=True)
class BatchFlags(Flags):
    """Rows of a pass; all that a search without gradients reads."""

    heading = "Optimiser"
    per_device_train_batch_size: int = flag(8, "rows per step and device", low=1)


@dataclass(frozen=True)
class OptimiserFlags(BatchFlags):
    """What transformers' Trainer is told; every other field of its arguments is a flag too."""

    heading = "Optimiser"
    whose = "belongs to training by gradient: --method sft, dpo, mask or soup, or --moe_flag 1; take one of them or drop it"
    learning_rate: float = flag(5e-4, "peak learning rate", low=0)
    num_train_epochs: float = flag(3.0, "passes over the data", low=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches per step", low=1)
    save_steps: int = flag(5000, "steps between checkpoints", low=1)
    logging_steps: int = flag(100, "steps between log lines", low=1)

    takes_training_arguments: ClassVar[bool] = True


@dataclass(frozen=True)
class EpochDecayFlags(Flags):
    """LoRA fusion's schedule."""

    heading = "Optimiser"
    lr_epoch_decay: float | None = flag(None, "factor on the learning rate after each epoch (StepLR), e.g. 0.85; empty: "
                                              "--lr_scheduler_type decides")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lr_epoch_decay is not None and not 0 < self.lr_epoch_decay <= 1:
            found.append(f"--lr_epoch_decay {self.lr_epoch_decay}: must be above 0 and at most 1")
        return found
