"""Group of flags: the card that the hours and the memory of a plan are told for."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import Flags


@dataclass(frozen=True)
class CardFlags(Flags):
    """What a plan for another base than the embedded one is reckoned with; the defaults are an A100 of 80 GB, bfloat16."""

    heading = "Plan for another base (reckoned, not measured)"
    tflops: float = flag(312.0, "peak of the card, bfloat16, in TFLOPS", low=0.1)
    gpu_gb: float = flag(80.0, "memory of the card in GB (1e9 bytes)", low=0.1)
    bandwidth: float = flag(2039.0, "its memory bandwidth in GB/s: what an answer's next token waits for", low=0.1)
    used_share: float = flag(0.35, "share of the peak that a training step reaches", low=0.001)
    row_tokens: int = flag(200, "mean tokens of a row, prompt and answer, where --model_max_length allows as many", low=1)
    billions: float = flag(0.0, "parameters of the base in 1e9; 0: by its config.json, or by its name", low=0)

    @property
    def operations(self) -> float:
        """Operations a second that a training step reaches."""
        return self.tflops * 1e12 * self.used_share

    @property
    def answering(self) -> float:
        """Bytes a second that are read while answers are made: transformers' generate reaches about a quarter."""
        return self.bandwidth * 1e9 * 0.25

    def problems(self) -> list[str]:
        found = super().problems()
        if self.used_share > 1:
            found.append(f"--used_share {self.used_share}: a share of the peak; at most 1")
        return found
