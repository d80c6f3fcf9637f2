"""Groups of flags: steps, batches and learning rates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from config import flag
from flags.base import Flags
from flags.launch import launch_problems

#: Fields of transformers.TrainingArguments that our trainers do not read or that would break them: what stands for nothing
#: asked, and what to do instead. Taken in silence, each would make another run than the one asked for.
UNREAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": ((False,), "a batch that shrinks by itself makes other results; give "
                                       "--per_device_train_batch_size and --gradient_accumulation_steps"),
    "average_tokens_across_devices": ((True,), "an answer token weighs the same on whichever device it falls; drop it"),
    "bf16": ((False,), "--dtype says in what is computed; use --dtype bfloat16"),
    "bf16_full_eval": ((False,), "validation computes as training does; use --dtype bfloat16"),
    "data_seed": ((None,), "--seed orders the rows, too; use it"),
    "do_predict": ((False,), "a run is answered with by inference.py; drop it"),
    "do_train": ((True,), "this command trains; drop it"),
    "fp16": ((False,), "--dtype says in what is computed; use --dtype float16, on a GPU"),
    "fp16_full_eval": ((False,), "validation computes as training does; use --dtype float16, on a GPU"),
    "hub_token": ((None,), "a secret comes from the environment, where no manifest keeps it; set HF_TOKEN, and drop it"),
    "label_names": ((None, ["labels"]), "labels are made from the answers; drop it"),
    "label_smoothing_factor": ((0, 0.0), "the loss is the plain one; drop it"),
    "length_column_name": (("length",), "rows are grouped by their tokens; drop it"),
    "parallelism_config": ((None,), "it needs an object of accelerate's, which no command line can give; drop it"),
    "push_to_hub": ((False,), "a run's result lies in outputs/NAME of --output_dir; drop it, and upload that folder (hf "
                             "upload)"),
    "remove_unused_columns": ((False,), "every column of an encoded row is read; drop it"),
    "torch_compile": ((False, None), "the losses run a model's body and its head apart, on rows packed to new lengths at "
                                     "every step, which no compiled graph holds; drop it"),
    "torch_compile_backend": ((None,), "nothing is compiled; drop it"),
    "torch_compile_mode": ((None,), "nothing is compiled; drop it"),
    "train_sampling_strategy": (("random",), "rows of like length are batched, in an order that --seed gives; drop it"),
    "use_liger_kernel": ((False, None), "the loss reads the model without its head, which these kernels replace; drop it"),
}
#: Optimisers to which transformers passes no --optim_args, without a word.
_OWN_FLAGS = ("adamw_torch", "adamw_torch_fused", "adafactor")
_LEVELS = ("passive", "debug", "info", "warning", "error", "critical")
#: What --report_to can name -> the packages of which one is needed.
_TRACKERS = {"azure_ml": ("azureml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",), "comet_ml": ("comet_ml",),
             "dvclive": ("dvclive",), "mlflow": ("mlflow",), "neptune": ("neptune",), "swanlab": ("swanlab",),
             "tensorboard": ("tensorboard",), "trackio": ("trackio",), "wandb": ("wandb",)}
#: Those that training/tracking/trackers.py opens itself, each an extra of pyproject.toml; the others are transformers' own.
OWN_TRACKERS = ("tensorboard", "wandb")


def trackers_of(training: Mapping[str, Any]) -> tuple[str, ...]:
    """The trackers that --report_to asks for, each once; all: those that are installed."""
    asked = training.get("report_to") or []
    named = asked if isinstance(asked, list | tuple) else str(asked).split(",")
    words = [str(name).strip() for name in named]
    if "all" in words:
        words += [name for name, packages in _TRACKERS.items() if any(find_spec(package) for package in packages)]
    return tuple(name for name in dict.fromkeys(words) if name not in ("", "none", "all"))


@dataclass(frozen=True)
class BatchFlags(Flags):
    """Rows of a pass; all that a search without gradients reads."""

    heading = "Optimiser"
    per_device_train_batch_size: int = flag(8, "rows per step and device", low=1)


@dataclass(frozen=True)
class OptimiserFlags(BatchFlags):
    """What transformers' Trainer is told; every other field of its arguments is a flag too."""

    heading = "Optimiser"
    whose = "belongs to training by gradient: --method sft, dpo, mask or soup, or --moe_flag 1; take one of them or drop it"
    learning_rate: float = flag(5e-4, "peak learning rate", low=0)
    num_train_epochs: float = flag(3.0, "passes over the data", low=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches per step", low=1)
    save_steps: int = flag(5000, "steps between checkpoints", low=1)
    logging_steps: int = flag(100, "steps between log lines", low=1)
    save_on_signal: bool = flag(False, "on SIGTERM save a checkpoint behind the step and exit with 143; the same command "
                                       "goes on from there")

    takes_training_arguments: ClassVar[bool] = True

    @classmethod
    def training_problems(cls, training: dict[str, Any]) -> list[str]:
        # a token must not stand on the screen, nor in a log
        shown = {**training, "hub_token": "[hidden]"}
        found = [f"--{name} {shown[name]}: {advice}" for name, (neutral, advice) in UNREAD.items()
                 if name in training and training[name] not in neutral
                 # what is no truth value at all is said already
                 and not (isinstance(neutral[0], bool) and isinstance(training[name], str))]
        # transformers takes 0 and -5 for "not given" and trains all epochs
        if isinstance(steps := training.get("max_steps"), int) and steps != -1 and steps < 1:
            found.append(f"--max_steps {steps}: must be 1 or more; -1, or leaving it out, goes by --num_train_epochs")
        if (given := training.get("optim_args")) and (name := str(training.get("optim") or "adamw_torch")) in _OWN_FLAGS:
            found.append(f"--optim_args {given}: {name} takes none of these; drop it, or give --adam_beta1, --adam_beta2, "
                         "--adam_epsilon, --weight_decay")
        if (level := training.get("log_level")) is not None and level not in _LEVELS:
            found.append(f"--log_level {level}: not known; allowed: {', '.join(_LEVELS)}")
        found += launch_problems(training)
        for tracker in trackers_of(training):
            packages = _TRACKERS.get(tracker)
            if not packages:
                found.append(f"--report_to {tracker}: not known; allowed: none, {', '.join(_TRACKERS)}")
            elif not any(find_spec(package) for package in packages):
                how = f"run pip install -e .[{tracker}]" if tracker in OWN_TRACKERS else "install it"
                found.append(f"--report_to {tracker}: {' or '.join(packages)} is not installed; {how}, or use none")
            elif tracker == "wandb" and _wandb_asks():
                found.append("--report_to wandb: its key comes from the environment only, and WANDB_API_KEY is not set; "
                             "export it, or export WANDB_MODE=offline")
        return found


def _wandb_asks() -> bool:
    """Whether wandb would have to ask a person for its key."""
    mode = os.environ.get("WANDB_MODE", "online")
    return mode not in ("offline", "disabled", "dryrun") and not os.environ.get("WANDB_API_KEY", "").strip()


@dataclass(frozen=True)
class EpochDecayFlags(Flags):
    """LoRA fusion's schedule."""

    heading = "Optimiser"
    lr_epoch_decay: float | None = flag(None, "factor on the learning rate after each epoch (StepLR), e.g. 0.85; empty: "
                                              "--lr_scheduler_type decides")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lr_epoch_decay is not None and not 0 < self.lr_epoch_decay <= 1:
            found.append(f"--lr_epoch_decay {self.lr_epoch_decay}: must be above 0 and at most 1")
        return found
