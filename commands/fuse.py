"""Flags of models/llama_moe.py and of models/fuse.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.base import OBJECTIVES, RAW_MOE, Common, name_problems
from config import flag


@dataclass(frozen=True)
class FuseMoeArgs(Common):
    """Build the raw fused MoE from trained adapters: one shared FFN plus one low-rank expert per adapter.

    cd models; python llama_moe.py
    """

    experts: str = flag("helpfulness,safety,truthfulness", "run names or adapter folders, in objective order")
    expert_topk: int = flag(2, "experts per token", low=1)
    router_init: str = flag("random", "random: N(0, router_std); data: class means of each layer's FFN input",
                            choices=("random", "data"))
    router_std: float = flag(0.02, "standard deviation of a random router", low=0)
    router_rows: int = flag(48, "training rows per objective that a data router reads", low=2)
    router_sharpness: float = flag(4.0, "data router: standard deviation of the router logits over tokens", low=0)
    run_name: str = flag(RAW_MOE, "name of the fused model under results/outputs")

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.experts.split(",") if name.strip())

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "fuse")

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if len(self.expert_names) < 2:
            found.append(f"--experts {self.experts}: needs two adapters or more, separated by commas")
        if len(set(self.expert_names)) < len(self.expert_names):
            found.append(f"--experts {self.experts}: the same adapter twice; experts must differ")
        elif len({Path(name).name for name in self.expert_names}) < len(self.expert_names):
            found.append(f"--experts {self.experts}: two folders of the same name; experts are named after them")
        order = [OBJECTIVES.index(name) for name in self.expert_names if name in OBJECTIVES]
        if order != sorted(order):
            found.append(f"--experts {self.experts}: needs the order {', '.join(OBJECTIVES)}, because the gating loss "
                         "matches experts and objectives by position")
        if self.expert_topk > len(self.expert_names):
            found.append(f"--expert_topk {self.expert_topk}: there are {len(self.expert_names)} experts; "
                         f"allowed: 1 to {len(self.expert_names)}")
        return found


@dataclass(frozen=True)
class FuseAdaptersArgs(Common):
    """Fuse LoRA adapters into one, without their base model.

    python models/fuse.py --adapters helpfulness,safety,truthfulness --run_name average
    """

    adapters: str = flag("helpfulness,safety,truthfulness", "run names or adapter folders, separated by commas")
    weights: str = flag("", "a weight for each adapter, separated by commas; empty: equal, summing to 1")
    method: str = flag("cat", "cat: the exact weighted sum of the weight changes", choices=("cat",))
    run_name: str = flag("average", "name of the fused adapter under results/outputs")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.adapters.split(",") if name.strip())

    @property
    def adapter_weights(self) -> tuple[float, ...]:
        names = self.adapter_names
        return tuple(float(w) for w in self.weights.split(",")) if self.weights else (1 / len(names),) * len(names)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common",)

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        try:
            if not all(math.isfinite(weight) for weight in self.adapter_weights):
                found.append(f"--weights {self.weights}: every weight must be a finite number")
            if len(self.adapter_weights) != len(self.adapter_names):
                found.append(f"--weights {self.weights}: {len(self.adapter_names)} adapters need as many weights")
        except (ValueError, ZeroDivisionError):
            found.append(f"--weights {self.weights}: needs numbers separated by commas, one per adapter")
        return found
