"""What every training shares: arguments, batches, loss bookkeeping, the run itself. Each objective's loss is a module.

The loss modules return sums, and the trainer divides them by what the whole accumulated batch holds, so that batch x
accumulation gives the same losses however it is split.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

import manifest
from data.collate import pad_rows
from errors import SharedError, UserError
from flags.align import AlignArgs, ByGradient
from flags.launch import LAUNCH, sharding
from flags.optimiser import OWN_TRACKERS, trackers_of
from models.base.placement import compute_dtype
from training.answers import predicting_places
from training.checkpoints import SafeCheckpoints
from training.distributed.batches import BLANK, BucketSampler, with_blank
from training.distributed.signals import EXIT, SaveOnSignal
from training.resume import checkpoint_folder, resume_point
from training.tracking.progress import Progress
from training.tracking.trackers import tracking
from training.validation import EarlyStopping, WholeMeans

log = logging.getLogger(__name__)
#: What validation of language-model losses can tell -> whether more is better.
LOSS = {"loss": False}
class FusionTrainer(WholeMeans, SafeCheckpoints, Trainer):
    """A Trainer for loss modules that return named sums.

    The model's forward returns ``{"lm": sum over answer tokens, "tokens": their number, ...}``; other entries are
    auxiliary terms with a weight in ``weights``: those named in ``per_sample`` are sums over samples, the rest are
    values per forward pass.
    """

    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(self, *args: Any, weights: dict[str, float] | None = None, per_sample: Sequence[str] = (),
                 pad_to: int | None = None, epoch_decay: float | None = None, **kwargs: Any) -> None:
        self.epoch_decay = epoch_decay
        self.weights, self.per_sample = weights or {}, frozenset(per_sample)
        tokenizer = kwargs["processing_class"]

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = pad_rows(rows, tokenizer.pad_token_id, pad_to)
            # here labels are on the host yet: what a step asks of them later would make it wait for the device
            return batch | {"predicting": predicting_places(batch["labels"])}

        self._rows = len(kwargs["train_dataset"])
        if (many := kwargs["args"].world_size > 1):
            kwargs["train_dataset"] = with_blank(kwargs["train_dataset"], tokenizer.pad_token_id)
        if kwargs["args"].ddp_find_unused_parameters is None:
            # every parameter that trains is used in every pass: nothing has to be searched for after each
            kwargs["args"].ddp_find_unused_parameters = False if many else None
        super().__init__(*args, data_collator=collate, **kwargs)
        self.shard()
        # our loss is already divided by the tokens of the whole accumulated batch
        # (transformers looks for **kwargs in forward; finding none it would divide once more, by the accumulation steps)
        self.model_accepts_loss_kwargs = True
        # checked below and by us, without waiting for the device in every step
        self.args.logging_nan_inf_filter = False
        # tensors while a step runs, numbers where they are logged or kept: reading one makes the host wait for the device
        self._tokens: torch.Tensor | int = 0
        self._parts: dict[str, torch.Tensor | float] = {}
        #: The first step whose loss was no number, 0 so far, and that loss.
        self._broken: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps = 0
        self._group = (1, 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # noqa: ANN001 - transformers' signature
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._group = (sum(len(s["labels"]) for s in samples), len(samples))
        self._steps += 1
        self._tokens = self._tokens + sum(s["attention_mask"].sum() for s in samples)
        if self.args.world_size > 1:
            # blank rows of a short last batch are no samples. A process's share of all of them, since gradients are averaged
            real = sum((s["objectives"] != BLANK).sum() for s in samples).double().to(self.args.device)
            self._tokens = self._tokens - sum((s["objectives"] == BLANK).sum() for s in samples)
            self._group = (self.accelerator.reduce(real, "mean"), len(samples))
        return samples, tokens

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
                     num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """The loss of a training step's micro-batch; validation goes by ``validation_terms``."""
        samples, passes = self._group
        parts = model(**inputs)
        # gradients are averaged over processes, but num_items_in_batch counts the tokens of all of them
        tokens = torch.as_tensor(num_items_in_batch) / self.accelerator.num_processes
        # a batch without an answer token would be 0/0, and one NaN turns the whole model to NaN
        terms = {"lm": parts["lm"] / tokens.clamp_min(1.0)}
        for name, weight in self.weights.items():
            # a loss module may leave out what it has no weight for
            if name in parts:
                # a drift depends on the weights alone and is the same in every pass: its mean over passes is the term itself
                value = parts[name] / (samples if name in self.per_sample else passes)
                terms[name] = value * weight
                self._count(name, value)
        loss = sum(terms.values())
        self._count("lm", terms["lm"])
        self._watch(loss.detach())
        return (loss, parts) if return_outputs else loss

    def _count(self, name: str, value: torch.Tensor) -> None:
        # fp64: a sum of many steps, as Python's own numbers would give it
        self._parts[name] = self._parts.get(name, 0.0) + value.detach().double()

    def _watch(self, loss: torch.Tensor) -> None:
        """Remember the first loss that is no number. On a GPU it is read at the next log line, checkpoint or end."""
        step, value = self._broken or (torch.zeros((), dtype=torch.long, device=loss.device), torch.zeros_like(loss))
        new = (step == 0) & ~torch.isfinite(loss)
        self._broken = torch.where(new, self.state.global_step + 1, step), torch.where(new, loss, value)
        # of several processes one alone must not stop: the others would wait for it
        if loss.device.type == "cpu" and self.args.world_size == 1:
            self._refuse_broken_loss()

    def _refuse_broken_loss(self) -> None:
        # transformers leaves a NaN out of the losses that it logs and trains on, into Adam's moments and checkpoints
        step, value = self._broken or (0, 0.0)
        if found := self.first_of_all(int(step), float(value)):
            raise SharedError(
                f"the loss became {found[1]} at step {found[0]}; lower "
                f"--learning_rate (now {self.args.learning_rate}) or the loss weights, or use --dtype float32"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.epoch_decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        # steps of an epoch, the short last batch included; the sampler drops no row
        group = _group(self.args)
        per_epoch = math.ceil(self._rows / group)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: self.epoch_decay ** (step // per_epoch))
        # as transformers' own method leaves it: a further train() then makes a new one
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def validation_terms(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[float, int]]:
        """The language-model loss alone; auxiliary terms, unweighted, beside it."""
        parts = model(**inputs)
        rows = len(inputs["labels"])
        return {"loss": (float(parts["lm"]), int(parts["tokens"])), **{
            name: (float(parts[name]), rows if name in self.per_sample else 1) for name in self.weights}}

    @property
    def tokens_seen(self) -> int:
        """Tokens of the rows so far, of all processes, pads left out; every process must ask."""
        return round(self.mean_of_all({"tokens": self._tokens})["tokens"] * self.args.world_size)

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"tokens": self.tokens_seen, "steps_since_log": self._steps,
                                     "parts": self.mean_of_all(self._parts)}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        # of all processes: one of them counts on from there
        self._tokens = progress["tokens"] if self.args.process_index == 0 else 0
        self._parts, self._steps = progress["parts"], progress["steps_since_log"]

    def _refuse_broken_weights(self) -> None:
        self._refuse_broken_loss()
        super()._refuse_broken_weights()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._refuse_broken_loss()
        if "loss" in logs and self._steps:
            # each part was divided by what the whole batch holds, so its sum over micro-batches is a step's value
            parts = self.mean_of_all(self._parts)
            logs |= {f"loss_{name}": round(value / self._steps, 5) for name, value in sorted(parts.items())}
            self._parts, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        # micro-batches of one step share a group, so all devices pad alike and none waits for another's long rows
        group = _group(self.args)
        lengths = [len(row["input_ids"]) for row in rows[: self._rows]]
        return BucketSampler(lengths, group, self.args.seed, filled=self.args.world_size > 1)


def training_arguments(args: ByGradient, extra: dict[str, Any], kind: type[TrainingArguments] = TrainingArguments, *,
                       rows: int = 0, validates: bool = False, measured: Mapping[str, bool] = LOSS,
                       **more: Any) -> TrainingArguments:
    """Our flags plus every TrainingArguments field given on the command line or in the preset.

    Args:
        rows: how many there are to train on.
        validates: whether there are rows to validate on.
        measured: what this training's validation can tell, without "eval_" -> whether more is better.
        more: what an objective needs; what the user gave stands over it.

    Raises:
        UserError: a field was refused, or what was asked for cannot be done.
    """
    values = {
        "output_dir": str(checkpoint_folder(args)),
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.num_train_epochs,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "per_device_eval_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "save_steps": args.save_steps,
        "logging_steps": args.logging_steps,
        "seed": args.seed,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "report_to": "none",
        # the collator makes "objectives" of the column "objective", which forward does not name
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "use_cpu": args.device == "cpu" or not torch.cuda.is_available(),
        # an answer token weighs the same on whichever device its row falls; compute_loss relies on this sum
        "average_tokens_across_devices": True,
        # the loss modules run under their own autocast
        "bf16": False,
        # float16's small gradients vanish without a scaled loss, which transformers' float16 mode brings along
        "fp16": _trains_in_float16(args),
        **more,
        # the last one wins: what the user gave stands over what an objective needs
        **extra,
    }
    # FSDP is ours (training/distributed), and --dtype says in what is computed, whatever accelerate's file says of both
    for name in ("fsdp", "fsdp_config"):
        values.pop(name, None)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    # those of ours are opened for the training itself (fit)
    others = [name for name in trackers_of(extra) if name not in OWN_TRACKERS]
    values |= {"report_to": others or "none"} | ({"run_name": args.name} if others and "run_name" not in extra else {})
    # the old name yields to the new one, which some trainers set: what the user asked for must not get lost
    for old in [name for name in values if name.startswith("gradient_checkpointing")]:
        values[old.replace("gradient", "activation")] = values.pop(old)
    problems = _validation_problems(args, values, validates, measured)
    if problems:
        raise UserError(*problems)
    _select_best(args, values, extra, measured)
    try:
        made = kind(**values)
    # a package that lacks or a mapping of another shape shows itself in any of these
    except (TypeError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise UserError(f"a training argument was refused by {kind.__name__}: {error}") from None
    made.sharding = sharding(extra)
    if made.sharding and (bits := getattr(args, "base_quantization", None)):
        raise UserError(f"--base_quantization {bits}: a base in few bits cannot be parted by FSDP2; drop the flag, or start "
                        "with --config_file scripts/accelerate/ddp.yaml")
    steps = _steps(made, rows)
    if made.load_best_model_at_end and made.eval_strategy.value == "steps" and made.eval_steps > steps:
        raise UserError(f"--eval_steps {made.eval_steps}: this training takes {steps} steps, so there would be no best "
                        "checkpoint; lower --eval_steps, or use --eval_strategy epoch")
    if made.n_gpu > 1:
        # transformers would copy the model to all of them for every step (DataParallel), which our losses do not survive
        log.info("%d GPUs are visible and one trains; to use them all: %s", made.n_gpu,
                 LAUNCH.format("ddp.yaml", made.n_gpu))
        made._n_gpu = 1
    if made.world_size > 1:
        # a resumed run may have another number of processes where a step keeps its rows
        log.info("%d processes%s: %d rows a step", made.world_size, " by FSDP2" if made.sharding else "", _group(made))
    return made


def loaded_on(made: TrainingArguments, device: torch.device) -> torch.device:
    """Where a model is loaded: where it trains, but for one that is parted among the processes, which starts on the CPU."""
    return torch.device("cpu") if made.sharding else device


def _steps(made: TrainingArguments, rows: int) -> int:
    """Optimiser steps of a training."""
    return made.max_steps if made.max_steps > 0 else math.ceil(made.num_train_epochs * math.ceil(rows / _group(made)))


def _group(made: TrainingArguments) -> int:
    """Rows of an optimiser step over all processes."""
    return made.per_device_train_batch_size * made.gradient_accumulation_steps * made.world_size


def _trains_in_float16(args: AlignArgs) -> bool:
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    if compute_dtype(args.dtype, torch.device("cpu" if on_cpu else "cuda")) != torch.float16:
        return False
    if on_cpu:
        raise UserError(f"--dtype {args.dtype}: training in float16 scales its loss, which needs a GPU; use bfloat16 or "
                        "float32 on a CPU")
    return True


def validates_on_the_way(extra: Mapping[str, Any]) -> bool:
    """Whether transformers is asked to validate, by whichever of its fields."""
    return _strategy(extra) != "no" or any(extra.get(n) for n in ("eval_on_start", "do_eval", "load_best_model_at_end"))


def _strategy(values: Mapping[str, Any]) -> str:
    return str(values.get("eval_strategy") or "no")


def _metric(values: Mapping[str, Any]) -> str:
    return str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")


def _validation_problems(args: ByGradient, values: Mapping[str, Any], validates: bool,
                         measured: Mapping[str, bool]) -> list[str]:
    found, strategy = [], _strategy(values)
    patience = args.early_stopping_patience
    if strategy not in ("no", "steps", "epoch"):
        found.append(f"--eval_strategy {strategy}: not known; allowed: no, steps, epoch")
    if not validates and validates_on_the_way(values):
        asked = f"--eval_strategy {strategy}" if strategy != "no" else "--load_best_model_at_end" if values.get(
            "load_best_model_at_end") else "--eval_on_start or --do_eval"
        found.append(f"{asked}: there is nothing to validate on; give --validation_path FILE or --validation_share 0.1")
    for flag, needed in (("--load_best_model_at_end", values.get("load_best_model_at_end")),
                         (f"--early_stopping_patience {patience}", patience is not None)):
        if needed and strategy == "no":
            found.append(f"{flag}: needs validation on the way; add --eval_strategy epoch, or steps with --eval_steps N")
    if _metric(values) not in measured:
        found.append(f"--metric_for_best_model {values['metric_for_best_model']}: this training does not measure it; "
                     f"allowed: {', '.join(measured)}")
    return found


def _select_best(args: ByGradient, values: dict[str, Any], extra: Mapping[str, Any], measured: Mapping[str, bool]) -> None:
    """Settings that a search for the best checkpoint needs; changes ``values``."""
    if not (values.get("load_best_model_at_end") or args.early_stopping_patience is not None):
        return
    values["metric_for_best_model"] = f"eval_{_metric(values)}"
    # transformers takes everything but losses for a gain; a drift or a gate's loss is none
    values.setdefault("greater_is_better", measured[_metric(values)])
    if values.get("load_best_model_at_end") and "save_strategy" not in extra:
        # the best of the validated weights must be on disk to be taken
        values["save_strategy"] = _strategy(values)
        if _strategy(values) == "steps":
            values["save_steps"] = values.get("eval_steps") or values["logging_steps"]
            if values["save_steps"] != args.save_steps:
                log.info("--load_best_model_at_end: a checkpoint at every validation, each %s steps, not --save_steps %d",
                         values["save_steps"], args.save_steps)


def fit(trainer: Any, args: ByGradient, extra: dict[str, Any]) -> dict[str, Any]:
    """Train, from the last whole checkpoint if there is one; returns the metrics for the manifest.

    Args:
        trainer: a ``Trainer`` with ``SafeCheckpoints`` and ``WholeMeans``.
        extra: the training arguments of the command line.
    """
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold or 0.0))
    Progress.of(trainer, args.name)
    # one process looks and removes what is outdated; the others must not look while it does
    start = [resume_point(args, args.settings(extra), extra.get("resume_from_checkpoint"), trainer.checkpoint_files,
                          trainer.weight_places, trainer.args.world_size)
             if manifest.is_main() else None]
    broadcast_object_list(start)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracking(trainer, args, extra))
        if args.save_on_signal:
            trainer.add_callback(signals := SaveOnSignal(trainer.args.world_size))
            stack.enter_context(signals.listening())
        trainer.train(resume_from_checkpoint=start[0])
    if args.save_on_signal and signals.saved:
        raise SystemExit(EXIT)
    steps, state = trainer.state.global_step, trainer.state
    if not steps:
        raise UserError(f"run '{args.name}': no training step was taken; raise --num_train_epochs or --max_steps")
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is None:
        raise UserError(f"run '{args.name}': --load_best_model_at_end found no validated checkpoint in {steps} steps; lower "
                        "--eval_steps, or drop it")
    seconds = trainer.seconds
    metrics = {
        # of all steps: transformers' own figure is that of the steps since the run was resumed
        "train_loss": trainer._total_loss_scalar / steps,
        "steps": steps,
        "train_seconds": round(seconds, 2),
        "history": [entry for entry in state.log_history if "loss" in entry],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    # TRL's trainers do not count theirs
    if tokens := getattr(trainer, "tokens_seen", 0):
        metrics["tokens"] = tokens
        metrics["tokens_per_second"] = round(tokens / seconds, 1)
    if trainer.args.world_size > 1:
        metrics |= {"processes": trainer.args.world_size, "held_bytes_per_process": trainer.held_bytes()}
    if validated := [entry for entry in state.log_history if "eval_loss" in entry]:
        metrics["validation_history"] = validated
    if trainer.args.load_best_model_at_end:
        metrics["best_step"] = state.best_global_step
    if trainer.eval_dataset is not None:
        metrics |= {f"validation_{name}": value for name, value in trainer.validate().items()}
    return metrics
