"""What the flags of every command share. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from config import ROOT, flag

#: Objective ids, in the order that H3Fusion's code uses everywhere (spec section 0).
OBJECTIVES: tuple[str, ...] = ("helpfulness", "safety", "truthfulness")
TASKS = ("truthfulness", "safety", "helpfulness", "mix")
RAW_MOE = "raw_moe"


@dataclass(frozen=True)
class Common:
    """Flags that every command shares."""

    model_name_or_path: str = flag("embedded", "base model: 'embedded', a local folder, or a hub name")
    output_dir: str = flag(str(ROOT / "results"), "root of everything written")
    cache_dir: str | None = flag(None, "hub cache folder; empty: the hub's own default")
    dtype: str = flag("auto", "weights and matrix products; auto: bfloat16 where the processor computes in it",
                      choices=("auto", "float32", "bfloat16", "float16"))
    device: str = flag("auto", "auto: cuda when there is one, else cpu", choices=("auto", "cpu", "cuda"))
    threads: int = flag(0, "torch threads on a CPU; 0: one per core that this process may use", low=0)
    seed: int = flag(42, "seeds every random choice", low=0)
    template: str = flag("chat", "chat: the model's own chat template; alpaca: Stanford Alpaca plus an end marker",
                         choices=("chat", "alpaca"))
    overwrite: bool = flag(False, "replace a finished run of the same name")

    takes_training_arguments: ClassVar[bool] = False

    @property
    def results(self) -> Path:
        return Path(self.output_dir).expanduser().resolve()

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common",)

    def problems(self) -> list[str]:
        return []


def name_problems(name: str, value: str | None) -> list[str]:
    if value is None or (value and all(c.isalnum() or c in "._-@+" for c in value) and not value.startswith(".")):
        return []
    return [f"{name} {value}: letters, digits, '.', '_', '-' only, and no leading dot"]
