"""Flags of align_basemodel.py: one class for each objective, made of the groups that its training reads.

``TRAINED`` says which values of --moe_flag and --method choose which objective; nothing else does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from config import flag, group_of, training_fields
from flags.base import DIALOGS, SKILLS, TASKS, ModelCommand, name_problems
from flags.data import DataFlags, FramedFlags, PaddingFlags, RecordFlags
from flags.lora import AdapterFlags, LoraFlags, QuantisedBaseFlags
from flags.mask import AnchorFlags, MaskFlags, narrow_logit_problems
from flags.moe import MoeFlags
from flags.optimiser import BatchFlags, EpochDecayFlags, OptimiserFlags, trackers_of
from flags.preferences import DpoFlags, PairFlags
from flags.soup import FUSED, SoupFlags
from flags.validation import ValidationFlags

#: Sections of a preset that one objective alone reads; in all others each takes its own keys.
_OWN_SECTIONS = ("align_moe", "align_dpo", "align_dpo_full", "align_mask")
#: Settings that a run does not name where they have these values: runs from before there were such flags are the same runs.
_UNSAID = {"max_safety_samples": None, "contrast_share": 0.0, "answer_share": 0.0, "extra_min_rows": 1,
           "pair_contrast_share": 0.0}


def run_name(task: str, gammas: tuple[float, float, float], gate: float) -> str:
    """The published name of a MoE run: each weight with four decimals, the dot removed (spec section 1.3)."""
    digits = [f"{value:.4f}".replace(".", "") for value in (*gammas, gate)]
    return f"{task}_moe_reg_{digits[0]}_{digits[1]}_{digits[2]}_gate_{digits[3]}"


def _moe_flag(value: int) -> Any:
    return flag(value, "0: dense base + LoRA; 1: fused MoE", choices=(0, 1))


def _method(value: str) -> Any:
    return flag(value, "training objective of a dense run; soup, search: weights of --adapters, by gradient or without",
                choices=("sft", "dpo", "mask", *FUSED))


@dataclass(frozen=True)
class AlignArgs(ModelCommand):
    """Train one expert, the fused MoE, a mask on task vectors, or the weights of trained adapters."""

    heading, general = "Objective", False
    moe_flag: int = _moe_flag(1)
    method: str = _method("sft")
    run_name: str | None = flag(None, "name of the run; empty: the published name")

    deciding: ClassVar[tuple[str, ...]] = ("moe_flag", "method")
    #: What the objective is called in messages, and the words that choose it.
    called: ClassVar[str] = ""
    words: ClassVar[str] = ""

    @classmethod
    def chosen(cls, given: dict[str, Any], preset: dict[str, Any]) -> tuple[type[AlignArgs], list[str]]:
        """The objective of --moe_flag and --method; a class that is an objective already stays."""
        if cls is not AlignArgs:
            return cls, []
        asked = {"method": "sft", **preset, **given}
        method, problems = asked["method"], []
        if method == "mask" and "method" not in given:
            problems, method = ["--method mask: give it on the command line; a preset cannot choose it"], "sft"
        if "moe_flag" not in asked and method in ("dpo", *FUSED):
            # 1 is the default, as published; but their own flags, and --help, are those of the method that was named
            return TRAINED[0, method], [*problems, _tuned_with_sft(method)]
        dense = method == "mask" or not asked.get("moe_flag", 1)
        return TRAINED[(0, method) if dense else (1, "sft")], problems

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "align")

    @classmethod
    def passes_over(cls, section: str, name: str) -> bool:
        return super().passes_over(section, name) or (
            section.startswith("align") and section not in _OWN_SECTIONS and bool(_owners(name)))

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        owners: list[Any] = _owners(name)
        if not owners:
            return super().elsewhere(name)
        ours = any(name == item.name for item in fields(owners[0]))
        # transformers' fields go with our own flags for its Trainer
        if whose := (group_of(owners[0], name) if ours else OptimiserFlags).whose:
            return whose
        if len(owners) == 1:
            return f"belongs to {owners[0].called}; add {owners[0].words} or drop it"
        named = ", ".join(f"{kind.called} ({kind.words})" for kind in owners)
        return f"belongs to {named}; take one of them or drop it"

    @property
    def name(self) -> str:
        return self.run_name or self.task_name  # type: ignore[attr-defined]  # every objective has one of its own

    def settings(self, training: dict[str, Any]) -> dict[str, Any]:
        """What identifies a run: every resolved flag and every extra training argument."""
        own = {k: v for k, v in asdict(self).items() if k not in _UNSAID or v != _UNSAID[k]}
        # how a run ends early does not make it another one
        own.pop("save_on_signal", None)
        # whether an interrupted run goes on or starts anew does not make it another run; from where (a path) does
        # nor does how its model is parted among processes
        kept = {k: v for k, v in training.items() if k not in ("fsdp", "fsdp_config")
                and (k != "resume_from_checkpoint" or not isinstance(v, bool))}
        # who is told of the losses does not either
        if trackers_of(kept):
            del kept["report_to"]
        return {**own, "training_arguments": kept}

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if type(self) is not TRAINED.get((self.moe_flag, self.method)):
            found.append(_tuned_with_sft(self.method) if self.moe_flag else
                         f"--method {self.method}: a preset chooses it in the section align, or the command line does")
        return [*found, *super().problems()]


@dataclass(frozen=True)
class _DenseArgs(AlignArgs):
    moe_flag: int = _moe_flag(0)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        task = given.get("task_name", "mix")
        kind = ("align_mix" if task == "mix" else "align_skill" if task in SKILLS else
                "align_dialogs" if task in DIALOGS else "align_expert")
        # every weight needs another learning rate than an adapter
        return ("common", "align", kind, *(["align_safety"] if task == "safety" else []),
                *(["align_full"] if given.get("tuning") == "full" else []))


@dataclass(frozen=True)
class ExpertArgs(_DenseArgs, DataFlags, RecordFlags, PaddingFlags, FramedFlags, QuantisedBaseFlags, AdapterFlags,
                 LoraFlags, OptimiserFlags, EpochDecayFlags, ValidationFlags):
    """Train one expert, or the naive mix: supervised fine-tuning of an adapter or of every weight.

    python align_basemodel.py --moe_flag 0 --task_name safety
    python align_basemodel.py --moe_flag 0 --task_name mix
    """

    called: ClassVar[str] = "an expert"
    words: ClassVar[str] = "--moe_flag 0 --method sft"


@dataclass(frozen=True)
class DpoArgs(_DenseArgs, DataFlags, DpoFlags, PairFlags, QuantisedBaseFlags, AdapterFlags, LoraFlags, OptimiserFlags,
              ValidationFlags):
    """Train one expert on preference pairs: direct preference optimisation of an adapter or of every weight.

    python align_basemodel.py --moe_flag 0 --task_name safety --method dpo
    """

    method: str = _method("dpo")

    called: ClassVar[str] = "DPO"
    words: ClassVar[str] = "--moe_flag 0 --method dpo"

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return (*super().sections(given), "align_dpo", *(["align_dpo_full"] if given.get("tuning") == "full" else []))

    def problems(self) -> list[str]:
        found = []
        if self.task_name in DIALOGS:
            found.append(f"--method dpo --task_name {self.task_name}: this set has no preference pairs; use --method sft")
        if self.task_name in SKILLS and not self.data_path:
            found.append(f"--method dpo --task_name {self.task_name}: needs preference pairs; give them with --data_path")
        return [*found, *super().problems()]


@dataclass(frozen=True)
class MaskArgs(_DenseArgs, MaskFlags, AnchorFlags, DpoFlags, PairFlags, DataFlags, OptimiserFlags, ValidationFlags):
    """Learn which part of task vectors to keep (SOMF): DPO on safety pairs, only the mask's logits train.

    python align_basemodel.py --method mask --aligned aligned --tasks english
    python align_basemodel.py --method mask --aligned aligned --tasks english,maths --merge_rule ties --run_name m1
    """

    method: str = _method("mask")
    task_name: str = flag("safety", "preference pairs to train on: an objective or mix", choices=(*TASKS, *SKILLS, *DIALOGS))

    called: ClassVar[str] = "a mask"
    words: ClassVar[str] = "--method mask"

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "align", "align_mask")

    @property
    def name(self) -> str:
        return self.run_name or "_".join(["mask", *(name.rstrip("/").rpartition("/")[2] for name in self.task_names)])

    def problems(self) -> list[str]:
        found = super().problems()
        if self.anchor != "none" and len(self.anchor_names) != len(self.task_names):
            found.append(f"--anchor_tasks {self.anchor_tasks or '(empty)'}: name the data of each entry of --tasks, "
                         f"{len(self.task_names)} in all")
        return found

    def clashes(self, training: dict[str, Any]) -> list[str]:
        return super().clashes(training) + narrow_logit_problems(self, self.learning_rate, training)


@dataclass(frozen=True)
class SearchArgs(_DenseArgs, SoupFlags, DataFlags, RecordFlags, FramedFlags, BatchFlags):
    """Search the weights of trained adapters without a gradient (LoraHub).

    python align_basemodel.py --moe_flag 0 --method search --adapters identity,safe --task_name dialogs --data_path few.jsonl
    """

    method: str = _method("search")

    called: ClassVar[str] = "a search"
    words: ClassVar[str] = "--moe_flag 0 --method search"

    def problems(self) -> list[str]:
        lacking = [] if len(set(self.adapter_names)) > 1 else [
            f"--method {self.method}: needs two different adapters or more, e.g. --adapters identity,safe"]
        return [*lacking, *super().problems()]


@dataclass(frozen=True)
class SoupArgs(SearchArgs, OptimiserFlags, EpochDecayFlags, ValidationFlags):
    """Learn the weights of trained adapters by gradient, layer by layer (LoRA Soups).

    python align_basemodel.py --moe_flag 0 --method soup --adapters identity,safe --task_name dialogs --data_path few.jsonl
    """

    method: str = _method("soup")

    called: ClassVar[str] = "a soup"
    words: ClassVar[str] = "--moe_flag 0 --method soup"


@dataclass(frozen=True)
class FusedMoeArgs(AlignArgs, MoeFlags, DataFlags, RecordFlags, PaddingFlags, QuantisedBaseFlags, LoraFlags, OptimiserFlags,
                   ValidationFlags):
    """Tune the fused MoE: its experts, its router, and LoRA on attention.

    python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01
    """

    called: ClassVar[str] = "the fused MoE"
    words: ClassVar[str] = "--moe_flag 1"

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "align", "align_moe")

    @property
    def name(self) -> str:
        return self.run_name or run_name(self.task_name, self.gammas, self.gate_loss_weight)

    def problems(self) -> list[str]:
        wrong = [] if self.task_name in TASKS else [
            f"--task_name {self.task_name}: the fused MoE is tuned on {', '.join(TASKS)}; add --moe_flag 0"]
        return [*wrong, *super().problems()]


#: What trains by gradient, and all that trains: a soup's flags are a search's and more.
ByGradient = ExpertArgs | DpoArgs | MaskArgs | SoupArgs | FusedMoeArgs
Objective = ExpertArgs | DpoArgs | MaskArgs | SearchArgs | FusedMoeArgs
#: (--moe_flag, --method) -> the objective.
TRAINED: dict[tuple[int, str], type[AlignArgs]] = {
    (1, "sft"): FusedMoeArgs, (0, "sft"): ExpertArgs, (0, "dpo"): DpoArgs, (0, "mask"): MaskArgs, (0, "soup"): SoupArgs,
    (0, "search"): SearchArgs}
AlignArgs.epilog = "Other objectives have other flags:\n" + "\n".join(
    f"  align_basemodel.py {kind.words} --help".ljust(58) + (kind.__doc__ or "").partition("\n")[0]
    for kind in TRAINED.values())


def _tuned_with_sft(method: str) -> str:
    return f"--method {method}: the fused MoE is tuned with sft; use --moe_flag 0 for {method}"


def _owners(name: str) -> list[type[AlignArgs]]:
    """The objectives that read a flag, ours or one of transformers.TrainingArguments."""
    return [kind for kind in TRAINED.values() if name in (item.name for item in fields(kind))
            or (kind.takes_training_arguments and name in training_fields())]
