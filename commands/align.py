"""Flags of align_basemodel.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from commands.base import RAW_MOE, TASKS, Common, name_problems
from config import flag


def run_name(task: str, gammas: tuple[float, float, float], gate: float) -> str:
    """The published name of a MoE run: each weight with four decimals, the dot removed (spec section 1.3)."""
    digits = [f"{value:.4f}".replace(".", "") for value in (*gammas, gate)]
    return f"{task}_moe_reg_{digits[0]}_{digits[1]}_{digits[2]}_gate_{digits[3]}"


@dataclass(frozen=True)
class AlignArgs(Common):
    """Train one expert (--moe_flag 0), the naive mix (--moe_flag 0 --task_name mix) or the fused MoE (--moe_flag 1).

    python align_basemodel.py --moe_flag 0 --task_name safety
    python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01
    """

    task_name: str = flag("mix", "what to train on", choices=TASKS)
    moe_flag: int = flag(1, "0: dense base + LoRA; 1: fused MoE", choices=(0, 1))
    method: str = flag("sft", "training objective of a dense run", choices=("sft", "dpo"))
    data_path: str | None = flag(None, "file or hub name (mix: helpfulness=FILE,safety=FILE,...); empty: --data_source")
    data_source: str = flag("embedded", "where data comes from without --data_path", choices=("embedded", "published"))
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves",
                           choices=("leak_free", "published"))
    max_train_samples: int = flag(-1, "rows per objective; -1: all", low=-1)
    mixing: str = flag("proportional", "mix: all rows as they are, or the same number from each objective",
                       choices=("proportional", "balanced"))
    model_max_length: int = flag(300, "tokens, prompt + answer; longer rows are cut and counted", low=8)
    pad_to_max: bool = flag(False, "pad every batch to model_max_length instead of to its longest row")
    learning_rate: float = flag(5e-4, "peak learning rate", low=0)
    num_train_epochs: float = flag(3.0, "passes over the data", low=0)
    per_device_train_batch_size: int = flag(8, "rows per step and device", low=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per step", low=1)
    save_steps: int = flag(5000, "steps between checkpoints", low=1)
    logging_steps: int = flag(100, "steps between log lines", low=1)
    lora_r: int = flag(8, "LoRA rank (dense runs: FFN; MoE runs: attention and experts)", low=1)
    lora_alpha: float = flag(4.0, "LoRA alpha; scale = alpha / r", low=0)
    lora_dropout: float = flag(0.1, "LoRA dropout", low=0)
    beta: float = flag(0.1, "DPO beta", low=0)
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
    run_name: str | None = flag(None, "name of the run; empty: the published name")

    takes_training_arguments: ClassVar[bool] = True

    @property
    def gammas(self) -> tuple[float, float, float]:
        return (self.helpfulness_weight, self.safety_weight, self.truthfulness_weight)

    @property
    def name(self) -> str:
        if self.run_name:
            return self.run_name
        if self.moe_flag:
            return run_name(self.task_name, self.gammas, self.gate_loss_weight)
        return self.task_name

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        if given.get("moe_flag", 1):
            return ("common", "align", "align_moe")
        kind = "align_mix" if given.get("task_name", "mix") == "mix" else "align_expert"
        return ("common", "align", kind, *(("align_dpo",) if given.get("method") == "dpo" else ()))

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if self.moe_flag and self.method != "sft":
            found.append(f"--method {self.method}: the fused MoE is tuned with sft; use --moe_flag 0 for {self.method}")
        if self.lora_dropout >= 1:
            found.append(f"--lora_dropout {self.lora_dropout}: must be below 1")
        if not self.moe_flag and any((*self.gammas, self.gate_loss_weight)):
            found.append("--gate_loss_weight and the drift weights belong to the fused MoE: add --moe_flag 1 or drop them")
        return found
