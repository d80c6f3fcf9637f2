"""What the flags of every command share. The standard library only."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from config import ROOT, flag

#: Objective ids, in the order that H3Fusion's code uses everywhere (spec section 0).
OBJECTIVES: tuple[str, ...] = ("helpfulness", "safety", "truthfulness")
TASKS = ("truthfulness", "safety", "helpfulness", "mix")
#: What an aligned model is tuned for (SOMF, spec section 2.1). Embedded: all but Hindi and code.
SKILLS = ("english", "chinese", "hindi", "maths", "code", "summaries")
#: Training sets (data/sets/dialogs.py). identity, contrasts and reattack are embedded, the others are files of yours;
#: dialogs: any file of a known shape.
DIALOGS = ("identity", "contrasts", "reattack", "aoa", "aoa_safety", "chatagi", "hpfa", "pure_bad", "alpaca", "dolly",
           "xsum", "gsm8k", "dialogs")
#: Styles whose exact text comes from a file of yours.
FILE_STYLES = ("aoa", "base", "pure_bad")
#: System text and frame around a question (data/prompt_styles.yaml).
STYLES = ("none", "orbit", "valet", "almanac", "alpaca", "dolly", *FILE_STYLES)
RAW_MOE = "raw_moe"
#: Published test sets beside the tasks' own (data/sets/protocols.yaml says how each is read and cut).
PROTOCOLS = (
    "beavertails_500", "beavertails", "beavertails_evaluation", "catqa", "catqa_full", "harmfulqa", "shadow_alignment",
    "dangerousqa", "hex_phi", "advbench", "xstest", "xstest_unsafe", "or_bench_hard", "alpacaeval_50", "alpacaeval",
    "truthfulqa_published", "truthfulqa_leak_free",
)
#: How inference.py can put a prompt (data/sets/attacks.py).
ATTACKS = ("none", "cot", "cou", "suffix", "prefill")
#: How the work is divided over devices (models/footprint/strategies.py has a row for each).
STRATEGIES = ("one", "ddp", "fsdp2", "zero2", "zero3")


#: Flags that a command does not read and takes all the same, because a published command line or a script of ours has them;
#: each says so on stderr. Command -> flag -> why.
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "EvaluateSafetyArgs": {"model_name": "H3Fusion's command has it"},
    "EvaluateTruthArgs": {"mode": "H3Fusion's command has it; one pass gives both"},
    "FuseAdaptersArgs": {"model_name_or_path": "adapters are fused on their files alone"},
    "MaskFiguresArgs": {"threads": "scripts/somf.sh passes it"},
    "SafetySetArgs": {"threads": "scripts/lora_fusion.sh passes it"},
}


@dataclass(frozen=True)
class Flags:
    """What every group of flags and every command is. A command inherits the groups whose flags its code reads, no other.

    Class variables:
        heading: over the group's flags in --help; groups of one heading stand together.
        general: whether commands of every kind have the group; it stands at the end of --help.
        whose: of a group, what is said where its flag is given to a command that does not read it; empty: made from the
            names of those that do.
        takes_training_arguments: whether every field of transformers.TrainingArguments is a flag too.
        deciding: flags that choose the command's class before anything else is read, through ``chosen``.
        positional: the flag that a first word without one is the value of; empty: every value has its flag.
        epilog: the end of --help.
    """

    heading: ClassVar[str] = ""
    general: ClassVar[bool] = False
    whose: ClassVar[str] = ""
    takes_training_arguments: ClassVar[bool] = False
    deciding: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[str] = ""
    epilog: ClassVar[str] = ""

    @classmethod
    def chosen(cls, given: dict[str, Any], preset: dict[str, Any]) -> tuple[type[Flags], list[str]]:
        """The command's class for these values of its deciding flags, and what is wrong with them together."""
        return cls, []

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        """The sections of a preset that the command reads, later ones over earlier ones."""
        return ("common",)

    @classmethod
    def passes_over(cls, section: str, name: str) -> bool:
        """Whether a preset's key that is no flag of this command is fine there: another command reads the section too."""
        return section == "common" and known(name)

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """What to say of a flag that is none of this command's; None for a flag that nobody has."""
        return "this command does not read it; drop it" if known(name) else None

    @classmethod
    def planned_by(cls) -> type[Flags] | None:
        """The flags that ask for the command's plan (--plan); None where it loads no model and fuses none."""
        return None

    @classmethod
    def beside(cls) -> tuple[type[Flags], ...]:
        """Groups that are asked beside the command's own flags and make no other run; ``config.parse`` keeps them apart."""
        return (*filter(None, [cls.planned_by()]), VerbosityFlags)

    @classmethod
    def without_effect(cls) -> dict[str, str]:
        """Flags that are taken and not read -> why."""
        return WITHOUT_EFFECT.get(cls.__name__, {})

    @classmethod
    def training_problems(cls, training: dict[str, Any]) -> list[str]:
        """What is wrong with the fields of transformers.TrainingArguments that were given."""
        return []

    @classmethod
    def idle(cls, values: dict[str, Any]) -> dict[str, str]:
        """Flags that nothing reads beside these values -> why; an error where one stands on the command line."""
        return {}

    def clashes(self, training: dict[str, Any]) -> list[str]:
        """What is wrong with the values beside the fields of transformers.TrainingArguments that were given."""
        return []

    def problems(self) -> list[str]:
        """What is wrong with the values; each group says what concerns itself, a command what concerns several."""
        return []


@functools.cache
def everywhere() -> frozenset[str]:
    """Names of the flags of all commands: a preset's section ``common`` may hold them, each command takes its own."""
    # asked for a name that no group of this file has: then every command's class is made
    from flags import COMMANDS

    return frozenset(item.name for command in COMMANDS for item in fields(command))


def known(name: str) -> bool:
    """Whether any command has a flag of this name."""
    # what most commands share is looked up first: the classes of all of them take a while
    return name in ModelCommand.__dataclass_fields__ or name in everywhere()


@dataclass(frozen=True)
class HubFlags(Flags):
    """Where the hub's files lie."""

    heading, general = "Base model", True
    cache_dir: str | None = flag(None, "hub cache folder; empty: the hub's own default")


@dataclass(frozen=True)
class BaseModelFlags(HubFlags):
    """The base model."""

    heading, general = "Base model", True
    model_name_or_path: str = flag("embedded", "base model: 'embedded', a local folder, or a hub name")


@dataclass(frozen=True)
class TemplateFlags(Flags):
    """The form in which a prompt is put to the model."""

    heading, general = "Base model", True
    template: str = flag("chat", "chat: the model's own chat template; alpaca: Stanford Alpaca plus an end marker; "
                                 "wizardlm: a bare response marker; llama2: Llama-2's chat format",
                         choices=("chat", "alpaca", "wizardlm", "llama2"))


@dataclass(frozen=True)
class ThreadFlags(Flags):
    """How many threads compute."""

    heading, general = "Machine", True
    threads: int = flag(0, "torch threads on a CPU; 0: one per core that this process may use", low=0)


@dataclass(frozen=True)
class DeviceFlags(ThreadFlags):
    """What computes."""

    heading, general = "Machine", True
    device: str = flag("auto", "auto: cuda when there is one, else cpu", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class MachineFlags(DeviceFlags):
    """What computes, and in which type."""

    heading, general = "Machine", True
    dtype: str = flag("auto", "weights and matrix products; auto: bfloat16 where the processor computes in it",
                      choices=("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class DeviceMapFlags(DeviceFlags):
    """Over how many devices one model may lie."""

    heading, general = "Machine", True
    device_map: str = flag("", "auto: one model over all GPUs, layer by layer, for a model larger than one of them; empty: "
                               "on one device", choices=("", "auto"))

    def problems(self) -> list[str]:
        return [*super().problems(), *device_map_problems(self.device_map, self.device)]


def device_map_problems(device_map: str, device: str) -> list[str]:
    """Where it makes no sense to spread a model."""
    found = []
    if device_map and device == "cpu":
        found.append(f"--device_map {device_map}: spreads a model over GPUs, and --device cpu uses none; drop one of both")
    if device_map and os.environ.get("WORLD_SIZE", "1") != "1":
        found.append(f"--device_map {device_map}: one process uses all GPUs, and {os.environ['WORLD_SIZE']} processes were "
                     "started, each with a whole model on a GPU of its own; start it without torchrun or accelerate launch, "
                     "or drop it")
    return found


@dataclass(frozen=True)
class SeedFlags(Flags):
    """Chance."""

    heading, general = "Results", True
    seed: int = flag(42, "seeds every random choice", low=0)

    def problems(self) -> list[str]:
        # NumPy's generator takes 32 bits
        large = [] if self.seed < 1 << 32 else [f"--seed {self.seed}: must be below {1 << 32}"]
        return [*super().problems(), *large]


@dataclass(frozen=True)
class ResultsFlags(Flags):
    """Where everything is written."""

    heading, general = "Results", True
    output_dir: str = flag(str(ROOT / "results"), "root of everything written")

    @property
    def results(self) -> Path:
        return Path(self.output_dir).expanduser().resolve()


@dataclass(frozen=True)
class RunFlags(ResultsFlags):
    """Where a run is written that is found again when its command is given once more."""

    heading, general = "Results", True
    overwrite: bool = flag(False, "replace a finished run of the same name")


@dataclass(frozen=True)
class VerbosityFlags(Flags):
    """How much every command says on the screen (console.py)."""

    heading, general = "Output", True
    quiet: bool = flag(False, "errors alone on stderr and no bars; on stdout the result, or where it lies")
    verbose: bool = flag(False, "what helps to find a fault too, and all that libraries say")

    def problems(self) -> list[str]:
        both = ["--quiet, --verbose: one says less, the other more; give one of the two"]
        return [*super().problems(), *(both if self.quiet and self.verbose else [])]


@dataclass(frozen=True)
class PlanFlags(Flags):
    """What is asked of a command's plan."""

    heading, general = "Plan", True
    plan: bool = flag(False, "tell parameters and memory by part and the peak of each device; load nothing, write nothing")
    plan_strategy: str = flag("", "with --plan: how the work is divided; empty: as the launcher says (accelerate launch), "
                                  "else one process", choices=("", *STRATEGIES))
    plan_devices: int = flag(0, "with --plan: number of devices; 0: the processes that were launched, else 1", low=0)
    plan_gb: float = flag(0.0, "with --plan: memory of each device in GB (1e9 bytes); 0: what is found here", low=0)
    plan_tokens: int = flag(0, "with --plan: tokens of the longest row (of a pair half of prompt and both answers), or "
                               "prompt; 0: --model_max_length, prompts of 256", low=0)

    @property
    def strategy(self) -> str:
        """Empty where the launcher decides."""
        return self.plan_strategy or ("fsdp2" if self.plan_devices > 1 else "")

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.plan:
            found += [f"--{name} {value}: belongs to --plan; add it, or drop this" for name, value in vars(self).items()
                      if name != "plan" and value]
        if self.plan_devices > 1 and self.plan_strategy == "one":
            found.append(f"--plan_devices {self.plan_devices}: --plan_strategy one is one process on one device; give "
                         f"{', '.join(STRATEGIES[1:])}")
        if self.plan_devices == 1 and self.plan_strategy not in ("", "one"):
            found.append(f"--plan_strategy {self.plan_strategy}: divides the work over devices, and --plan_devices is "
                         "1; give 2 or more, or drop one of the two")
        return found


@dataclass(frozen=True)
class Planned(Flags):
    """What a command is that tells with --plan what it would hold in memory."""

    @classmethod
    def planned_by(cls) -> type[Flags] | None:
        return PlanFlags


@dataclass(frozen=True)
class ModelCommand(BaseModelFlags, TemplateFlags, MachineFlags, SeedFlags, RunFlags, Planned):
    """What a command reads that puts prompts to a model and writes a run."""


def name_problems(name: str, value: str | None) -> list[str]:
    if value is None or (value and all(c.isalnum() or c in "._-@+" for c in value) and not value.startswith(".")):
        return []
    return [f"{name} {value}: letters, digits, '.', '_', '-' only, and no leading dot"]
