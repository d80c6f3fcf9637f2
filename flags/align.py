"""Flags of align_basemodel.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from config import flag
from flags.base import DIALOGS, RAW_MOE, SKILLS, STYLES, TASKS, Common, name_problems

#: Methods that seek the weights of trained adapters.
FUSED = ("soup", "search")


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

    task_name: str = flag("mix", "what to train on", choices=(*TASKS, *SKILLS, *DIALOGS))
    moe_flag: int = flag(1, "0: dense base + LoRA; 1: fused MoE", choices=(0, 1))
    method: str = flag("sft", "training objective of a dense run; mask has flags of its own: --method mask --help; soup, "
                              "search: weights of --adapters, by gradient or without",
                       choices=("sft", "dpo", "mask", *FUSED))
    data_path: str | None = flag(None, "file or hub name (mix: helpfulness=FILE,safety=FILE,...); empty: --data_source")
    data_source: str = flag("embedded", "where data comes from without --data_path", choices=("embedded", "published"))
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves",
                           choices=("leak_free", "published"))
    extra_data: str | None = flag(None, "file of more rows to train on (any known shape), e.g. a safety set")
    extra_share: float | None = flag(None, "share of all rows that come from --extra_data, e.g. 0.03; empty: all its rows")
    prompt_style: str | None = flag(None, "system text and frame around every prompt without a system text", choices=STYLES)
    prompt_style_file: str | None = flag(None, "file with the style's exact text: .txt, .yaml, or dialogs")
    max_train_samples: int = flag(-1, "rows per objective; -1: all", low=-1)
    mixing: str = flag("proportional", "mix: all rows as they are, or the same number from each objective",
                       choices=("proportional", "balanced"))
    model_max_length: int = flag(300, "tokens, prompt + answer; longer rows are cut and counted", low=8)
    pad_to_max: bool = flag(False, "pad every batch to model_max_length instead of to its longest row")
    learning_rate: float = flag(5e-4, "peak learning rate", low=0)
    lr_epoch_decay: float | None = flag(None, "factor on the learning rate after each epoch (StepLR), e.g. 0.85; empty: "
                                              "--lr_scheduler_type decides")
    num_train_epochs: float = flag(3.0, "passes over the data", low=0)
    per_device_train_batch_size: int = flag(8, "rows per step and device", low=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per step", low=1)
    save_steps: int = flag(5000, "steps between checkpoints", low=1)
    logging_steps: int = flag(100, "steps between log lines", low=1)
    tuning: str | None = flag(None, "dense runs: lora, or every weight in full; empty: lora", choices=("lora", "full"))
    lora_targets: str | None = flag(None, "modules that LoRA trains, e.g. q_proj,v_proj; empty: the FFN projections")
    base_quantization: str | None = flag(None, "hold the frozen base in 8 or 4 bits while an adapter trains (bitsandbytes); "
                                               "empty: as --dtype says", choices=("int8", "nf4"))
    init_adapter: str | None = flag(None, "go on training this adapter (a run or folder) with its own rank, alpha, modules")
    lora_r: int = flag(8, "LoRA rank (dense runs: FFN; MoE runs: attention and experts)", low=1)
    lora_alpha: float = flag(4.0, "LoRA alpha; scale = alpha / r", low=0)
    lora_dropout: float = flag(0.1, "LoRA dropout", low=0)
    beta: float = flag(0.1, "DPO beta", low=0)
    adapters: str | None = flag(None, "soup, search: the adapters whose weights are sought, commas; runs or folders")
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
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.adapters or "").split(",") if name.strip())

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
        task = given.get("task_name", "mix")
        kind = ("align_mix" if task == "mix" else "align_skill" if task in SKILLS else
                "align_dialogs" if task in DIALOGS else "align_expert")
        return ("common", "align", kind, *(("align_dpo",) if given.get("method") == "dpo" else ()))

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if self.method == "mask":
            found.append("--method mask: give it on the command line; a preset cannot choose it")
        if self.moe_flag and self.method != "sft":
            found.append(f"--method {self.method}: the fused MoE is tuned with sft; use --moe_flag 0 for {self.method}")
        if self.moe_flag and self.task_name in (*SKILLS, *DIALOGS):
            found.append(f"--task_name {self.task_name}: the fused MoE is tuned on {', '.join(TASKS)}; add --moe_flag 0")
        if self.task_name in DIALOGS and self.method == "dpo":
            found.append(f"--method dpo --task_name {self.task_name}: this set has no preference pairs; use --method sft")
        if self.task_name in SKILLS and self.method == "dpo" and not self.data_path:
            found.append(f"--method dpo --task_name {self.task_name}: needs preference pairs; give them with --data_path")
        if self.moe_flag:
            found += [f"--{name} {value}: belongs to dense runs; add --moe_flag 0 or drop it" for name, value in (
                ("tuning", self.tuning), ("lora_targets", self.lora_targets), ("init_adapter", self.init_adapter)) if value]
        if self.tuning == "full":
            found += [f"--{name} {value}: --tuning full trains no adapter; drop one of the two" for name, value in (
                ("lora_targets", self.lora_targets), ("init_adapter", self.init_adapter)) if value]
        if self.base_quantization and (self.moe_flag or self.method not in ("sft", "dpo") or self.tuning == "full"):
            found.append(f"--base_quantization {self.base_quantization}: the frozen base of one adapter; use it with "
                         "--moe_flag 0 --method sft or dpo, without --tuning full")
        if self.lora_dropout >= 1:
            found.append(f"--lora_dropout {self.lora_dropout}: must be below 1")
        if not self.moe_flag and any((*self.gammas, self.gate_loss_weight)):
            found.append("--gate_loss_weight and the drift weights belong to the fused MoE: add --moe_flag 1 or drop them")
        return found + self._fusion_problems()

    def _fusion_problems(self) -> list[str]:
        found = []
        given = [f"--{name} {value}" for name, value in (
            ("extra_data", self.extra_data), ("prompt_style", self.prompt_style), ("lr_epoch_decay", self.lr_epoch_decay))
            if value is not None]
        if given and (self.moe_flag or self.method == "dpo"):
            found.append(f"{', '.join(given)}: belongs to --moe_flag 0 with --method sft, soup or search")
        if self.extra_share is not None and not (self.extra_data and 0 < self.extra_share < 1):
            found.append(f"--extra_share {self.extra_share}: goes with --extra_data and lies between 0 and 1")
        if self.prompt_style_file and not self.prompt_style:
            found.append("--prompt_style_file: belongs to a style; add --prompt_style")
        if self.lr_epoch_decay is not None and not 0 < self.lr_epoch_decay <= 1:
            found.append(f"--lr_epoch_decay {self.lr_epoch_decay}: must be above 0 and at most 1")
        if self.method in FUSED and len(set(self.adapter_names)) < 2:
            found.append(f"--method {self.method}: needs two different adapters or more, e.g. --adapters identity,safe")
        if self.method in FUSED and (self.init_adapter or self.tuning):
            found.append(f"--method {self.method}: trains no adapter; drop --init_adapter and --tuning")
        if self.adapters and self.method not in FUSED:
            found.append(f"--adapters {self.adapters}: belongs to --method {' or '.join(FUSED)}")
        return found
