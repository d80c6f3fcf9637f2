"""Groups of flags: the LoRA that an objective trains, and the base below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config import flag
from flags.base import Flags


@dataclass(frozen=True)
class LoraFlags(Flags):
    """Rank and scale, of a dense run's adapter or of the fused MoE's attention and experts."""

    heading = "LoRA"
    lora_r: int = flag(8, "LoRA rank (dense runs: FFN; MoE runs: attention and experts)", low=1)
    lora_alpha: float = flag(4.0, "LoRA alpha; scale = alpha / r", low=0)
    lora_dropout: float = flag(0.1, "LoRA dropout", low=0)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lora_dropout >= 1:
            found.append(f"--lora_dropout {self.lora_dropout}: must be below 1")
        return found


@dataclass(frozen=True)
class AdapterFlags(Flags):
    """What a dense run trains: a new adapter, one that it goes on with, or every weight."""

    heading = "LoRA"
    whose = ("belongs to dense runs, --moe_flag 0 with --method sft or dpo; anything else trains no adapter on the base: "
             "add them or drop it")
    tuning: str | None = flag(None, "dense runs: lora, or every weight in full; empty: lora", choices=("lora", "full"))
    lora_targets: str | None = flag(None, "modules that LoRA trains, e.g. q_proj,v_proj; empty: the FFN projections")
    init_adapter: str | None = flag(None, "go on training this adapter (a run or folder) with its own rank, alpha, modules")

    @classmethod
    def idle(cls, values: dict[str, Any]) -> dict[str, str]:
        # a preset's values for new adapters are no mistake
        own = ("lora_r", "lora_alpha", "lora_dropout") if values.get("tuning") == "full" else ()
        return {**super().idle(values), **dict.fromkeys(own, "--tuning full trains no adapter; drop one of the two")}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.tuning == "full":
            found += [f"--{name} {value}: --tuning full trains no adapter; drop one of the two" for name, value in (
                ("lora_targets", self.lora_targets), ("init_adapter", self.init_adapter)) if value]
        return found


@dataclass(frozen=True)
class QuantisedBaseFlags(Flags):
    """The frozen base below an adapter, or below the fused MoE's experts, in few bits."""

    heading = "LoRA"
    whose = ("the frozen base of one adapter, or of the fused MoE; use it with --moe_flag 0 --method sft or dpo, without "
             "--tuning full, or with --moe_flag 1, or drop it")
    base_quantization: str | None = flag(None, "hold the frozen base in 8 or 4 bits while an adapter or the MoE trains "
                                               "(bitsandbytes); empty: as --dtype says", choices=("int8", "nf4"))

    def problems(self) -> list[str]:
        found = super().problems()
        # the fused MoE has no such flag: it never trains the base
        if self.base_quantization and getattr(self, "tuning", None) == "full":
            found.append(f"--base_quantization {self.base_quantization}: {QuantisedBaseFlags.whose}")
        return found
