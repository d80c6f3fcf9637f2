"""Group of flags: rows that no step trains on, and when training stops for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config import flag
from flags.base import Flags


@dataclass(frozen=True)
class ValidationFlags(Flags):
    """Validation of own data; embedded sets have rows for it, and --eval_strategy and its kin are transformers' flags."""

    heading = "Validation"
    validation_path: str | None = flag(None, "file or hub name of rows to validate on, as --data_path")
    validation_share: float | None = flag(None, "share of --data_path's rows to validate on and not to train on, e.g. 0.1; "
                                                "--seed and the prompts decide which")
    early_stopping_patience: int | None = flag(None, "stop after this many validations in a row without a better "
                                                     "--metric_for_best_model (loss); empty: never", low=1)
    early_stopping_threshold: float | None = flag(None, "how much better counts as better; empty: any", low=0)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.validation_path and self.validation_share is not None:
            found.append(f"--validation_share {self.validation_share}: --validation_path gives the rows already; drop "
                         "one of the two")
        # the command's own groups: every objective that validates reads data
        whole: Any = self
        if self.validation_share is not None:
            if not 0 < self.validation_share < 1:
                found.append(f"--validation_share {self.validation_share}: must lie between 0 and 1")
            if not whole.data_path and whole.data_source == "embedded":
                found.append(f"--validation_share {self.validation_share}: embedded data has validation rows of its own; "
                             "drop it, or give your data with --data_path")
        if self.validation_path and whole.task_name == "mix" and not all(
                part.partition("=")[2] for part in self.validation_path.split(",")):
            found.append(f"--validation_path {self.validation_path}: for --task_name mix give helpfulness=FILE,safety=FILE,"
                         "truthfulness=FILE")
        if self.early_stopping_threshold is not None and self.early_stopping_patience is None:
            found.append(f"--early_stopping_threshold {self.early_stopping_threshold}: goes with --early_stopping_patience; "
                         "add it or drop this")
        return found
