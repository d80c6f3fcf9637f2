"""What every training shares: arguments, batches, loss bookkeeping, resume. Each objective's loss is a module.

The loss modules return sums, and the trainer divides them by what the whole accumulated batch holds, so that batch x
accumulation gives the same losses however it is split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

import manifest
from data.collate import pad_rows
from errors import UserError
from flags import AlignArgs
from training.checkpoints import SafeCheckpoints

log = logging.getLogger(__name__)
#: Batches whose rows are sorted by length together, then shuffled as batches.
_BUCKET = 16


class BucketSampler(Sampler):
    """Batches of rows of similar length, in an order that depends on (seed, epoch) alone.

    Args:
        lengths: tokens of each row.
        group: rows of one optimiser step over all devices and micro-batches.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, 0

    # accelerate's data loader calls this before each epoch, also when a resumed run skips what it has seen
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        # so far apart that no epoch of one seed draws the stream of another's
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        bucket = self.group * _BUCKET
        batches = []
        for start in range(0, len(order), bucket):
            # like lengths beside each other: a batch is padded to its longest row
            rows = sorted(order[start : start + bucket], key=lambda i: self.lengths[i])
            batches += [rows[i : i + self.group] for i in range(0, len(rows), self.group)]
        # a short batch must come last: the data loader cuts the stream into equal groups
        short = [batch for batch in batches if len(batch) < self.group]
        full = [batch for batch in batches if len(batch) == self.group]
        # shuffled once more, else every bucket would train from its shortest rows to its longest
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in short:
            yield from batch


class FusionTrainer(SafeCheckpoints, Trainer):
    """A Trainer for loss modules that return named sums.

    The model's forward returns ``{"lm": sum over answer tokens, "tokens": their number, ...}``; other entries are
    auxiliary terms with a weight in ``weights``: those named in ``per_sample`` are sums over samples, the rest are
    values per forward pass.
    """

    def __init__(self, *args: Any, weights: dict[str, float] | None = None, per_sample: Sequence[str] = (),
                 pad_to: int | None = None, epoch_decay: float | None = None, **kwargs: Any) -> None:
        self.epoch_decay = epoch_decay
        self.weights, self.per_sample = weights or {}, frozenset(per_sample)
        tokenizer = kwargs["processing_class"]
        collate = lambda rows: pad_rows(rows, tokenizer.pad_token_id, pad_to)  # noqa: E731
        super().__init__(*args, data_collator=collate, **kwargs)
        # our loss is already divided by the tokens of the whole accumulated batch
        # (transformers looks for **kwargs in forward; finding none it would divide once more, by the accumulation steps)
        self.model_accepts_loss_kwargs = True
        self.tokens_seen = 0
        self._parts: dict[str, float] = {}
        self._steps = 0
        self._group = (1, 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # noqa: ANN001 - transformers' signature
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        # this process's counts will do: gradients are averaged over processes, and so are these means
        self._group = (sum(len(s["labels"]) for s in samples), len(samples))
        self._steps += 1
        self.tokens_seen += sum(int(s["attention_mask"].sum()) for s in samples)
        return samples, tokens

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
                     num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        # given in training alone: our prediction_step hands none on
        training = num_items_in_batch is not None
        samples, passes = self._group if training else (len(inputs["labels"]), 1)
        parts = model(**inputs)
        # gradients are averaged over processes, but num_items_in_batch counts the tokens of all of them
        tokens = num_items_in_batch / self.accelerator.num_processes if training else parts["tokens"]
        # a batch without an answer token would be 0/0, and one NaN turns the whole model to NaN
        terms = {"lm": parts["lm"] / max(float(tokens), 1.0)}
        for name, weight in self.weights.items():
            # a drift depends on the weights alone and is the same in every pass: its mean over passes is the term itself
            value = parts[name] / (samples if name in self.per_sample else passes)
            terms[name] = value * weight
            if training:
                self._parts[name] = self._parts.get(name, 0.0) + float(value.detach())
        loss = sum(terms.values())
        if training:
            self._parts["lm"] = self._parts.get("lm", 0.0) + float(terms["lm"].detach())
            # transformers leaves a NaN out of the losses that it logs and trains on, into Adam's moments and checkpoints
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss became {float(loss.detach())} at step {self.state.global_step + 1}; lower "
                    f"--learning_rate (now {self.args.learning_rate}) or the loss weights, or use --dtype float32"
                )
        return (loss, parts) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.epoch_decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        # steps of an epoch, the short last batch included; the sampler drops no row
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        per_epoch = math.ceil(len(self.train_dataset) / group)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: self.epoch_decay ** (step // per_epoch))
        # as transformers' own method leaves it: a further train() then makes a new one
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # noqa: ANN001
        # transformers' own would hand num_items_in_batch on, which marks a training step here
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps:
            # each part was divided by what the whole batch holds, so its sum over micro-batches is a step's value
            logs |= {f"loss_{name}": round(value / self._steps, 5) for name, value in sorted(self._parts.items())}
            self._parts, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        # micro-batches of one step share a group, so all devices pad alike and none waits for another's long rows
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return BucketSampler([len(row["input_ids"]) for row in rows], group, self.args.seed)


def training_arguments(args: AlignArgs, extra: dict[str, Any], kind: type[TrainingArguments] = TrainingArguments,
                       **more: Any) -> TrainingArguments:
    """Our flags plus every TrainingArguments field given on the command line or in the preset."""
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
        **more,
        # the last one wins: what the user gave stands over what an objective needs
        **extra,
    }
    # the old name yields to the new one, which some trainers set: what the user asked for must not get lost
    for old in [name for name in values if name.startswith("gradient_checkpointing")]:
        values[old.replace("gradient", "activation")] = values.pop(old)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"a training argument was refused by {kind.__name__}: {error}") from None


def checkpoint_folder(args: AlignArgs) -> Path:
    return args.results / "checkpoints" / args.name


def resume_point(args: AlignArgs, settings: dict[str, Any]) -> str | None:
    """The newest checkpoint of this very configuration; None to start anew.

    Raises:
        UserError: there are checkpoints of another configuration under this name and ``--overwrite`` is off.
    """
    folder = checkpoint_folder(args)
    record = folder / "settings.json"
    # by number: as text checkpoint-1000 comes before checkpoint-200
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if checkpoints and not args.overwrite:
        if manifest.same_settings(record, settings):
            log.info("resuming from %s", checkpoints[-1])
            return str(checkpoints[-1])
        raise UserError(f"{folder}: holds checkpoints of another configuration; use another --run_name, or --overwrite")
    if manifest.is_main():
        for old in checkpoints:
            manifest.remove(old)
        # before the first step, so that the checkpoints of a run that was killed at any moment can be told from another's
        manifest.write_json(record, settings)
    return None


def fit(trainer: Trainer, args: AlignArgs, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; returns the metrics for the manifest."""
    result = trainer.train(resume_from_checkpoint=resume_point(args, settings))
    if not trainer.state.global_step:
        raise UserError(f"run '{args.name}': no training step was taken; raise --num_train_epochs or --max_steps")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "train_seconds": round(result.metrics["train_runtime"], 2),
        "history": history,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    # TRL's trainers do not count theirs
    if tokens := getattr(trainer, "tokens_seen", 0):
        metrics["tokens"] = tokens
        metrics["tokens_per_second"] = round(tokens / result.metrics["train_runtime"], 1)
    if trainer.eval_dataset is not None:
        metrics["validation_loss"] = trainer.evaluate()["eval_loss"]
    return metrics


def settings_of(args: AlignArgs, extra: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run: every resolved flag and every extra training argument."""
    return {**asdict(args), "training_arguments": extra}
