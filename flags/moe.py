"""Group of flags: tuning of the fused MoE."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import RAW_MOE, Flags


@dataclass(frozen=True)
class MoeFlags(Flags):
    """The fused model, its routing and its regularisers (H3Fusion, section 5)."""

    heading = "Fused MoE"
    raw_moe: str = flag(RAW_MOE, "MoE runs: the fused model to start from (models/llama_moe.py)")
    expert_topk: int = flag(2, "experts per token", low=1)
    gate_loss_weight: float = flag(0.0, "lambda, weight of the gating loss", low=0)
    helpfulness_weight: float = flag(0.0, "gamma_1, drift weight of the helpful expert", low=0)
    safety_weight: float = flag(0.0, "gamma_2, drift weight of the harmless expert", low=0)
    truthfulness_weight: float = flag(0.0, "gamma_3, drift weight of the honest expert", low=0)
    gate_tokens: str = flag("answer", "tokens that the gating loss averages over",
                            choices=("answer", "prompt", "nonpad", "all"))
    gate_per_layer: bool = flag(False, "a gating loss per layer instead of one on the layer mean")
    drift_mode: str = flag("norm", "drift of an expert: Frobenius norm, its square, or relative to the base weights",
                           choices=("norm", "squared", "relative"))
    attention_lora: bool = flag(True, "MoE runs: train LoRA on attention too")
    train_router: bool = flag(True, "MoE runs: train the router")
    router_learning_rate: float | None = flag(None, "learning rate of the router; empty: --learning_rate", low=0)
    compat: str = flag("none", "published: the original's double softmax, weight norm and frozen router",
                       choices=("none", "published"))

    @property
    def gammas(self) -> tuple[float, float, float]:
        return (self.helpfulness_weight, self.safety_weight, self.truthfulness_weight)
