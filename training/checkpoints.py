"""Trainer checkpoints without pickle: trainable weights, optimiser, scheduler, random states, and how far the training is.

Tensors go into safetensors, the rest into JSON. A checkpoint is written aside and renamed when it is whole. Sharded back
ends (DeepSpeed, FSDP) keep their own formats.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import ExportableState

import manifest
from errors import UserError
from training.resume import fault, rotate

log = logging.getLogger(__name__)
TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "resume_state.json"
PROGRESS, SCALER = "progress.json", "scaler.json"


class SafeCheckpoints:
    """Mix into a ``transformers.Trainer``: set ``save_artifact`` to write what inference loads."""

    save_artifact: Callable[[Path], None]
    #: The file of what trains.
    weights_file = TRAINABLE
    _resumed: dict[str, Any] | None = None
    _started: float = 0.0
    #: Seconds that a resumed run trained before.
    seconds_before: float = 0.0

    @property
    def checkpoint_files(self) -> list[str]:
        """What a whole checkpoint holds, beside what transformers notes."""
        if self._sharded:
            return []
        ranks = [f"rng_{rank}.safetensors" for rank in range(self.args.world_size)]
        return [self.weights_file, OPTIMIZER, STATE, *ranks]

    @property
    def _sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    # ---- making

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with _refused(f"--optim {getattr(self.args.optim, 'value', self.args.optim)}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        kind = self.args.lr_scheduler_type
        with _refused(f"--lr_scheduler_type {getattr(kind, 'value', kind)}"):
            return super().create_scheduler(*args, **kwargs)

    # ---- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # transformers writes into the final folder: a kill would leave half a checkpoint as the newest
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        staging = folder / f".{final.name}.partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            self._refuse_broken_weights()
        self.accelerator.wait_for_everyone()
        self.store_flos()
        self.save_model(str(staging), _internal_call=True)
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        progress = self.progress()
        if self.args.should_save:
            manifest.write_json(staging / PROGRESS, progress)
            for state in (*self.callback_handler.callbacks, self.control):
                if isinstance(state, ExportableState):
                    self.state.stateful_callbacks[type(state).__name__] = state.state()
            self.state.save_to_json(str(staging / "trainer_state.json"))
        # every process has its random states in it
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            manifest.swap(staging, final)
            rotate(folder, self.args.save_total_limit, {final.name, Path(self.state.best_model_checkpoint or final).name})
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self.accelerator.wait_for_everyone()

    def _refuse_broken_weights(self) -> None:
        # the loss of a step is finite before its gradient breaks the weights; a run that resumes there never recovers
        if not self._sharded and (name := next((n for n, p in self.model.named_parameters() if p.requires_grad
                                                and not torch.isfinite(p).all()), None)):
            raise UserError(f"{name} is no longer finite at step {self.state.global_step}, so no checkpoint of it is kept; "
                            f"lower --learning_rate (now {self.args.learning_rate}), or use --dtype float32")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable(self.model), folder / TRAINABLE)
        self.save_artifact(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        # one process writes for all: under DDP they hold the same moments
        elif self.args.should_save:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        # a file for each process: every one draws its own dropout
        save_rng(Path(output_dir, f"rng_{self.args.process_index}.safetensors"))

    def _save_scaler(self, output_dir: str) -> None:
        # float16's loss scale; transformers would pickle it
        if (scaler := getattr(self.accelerator, "scaler", None)) is not None and self.args.should_save:
            manifest.write_json(Path(output_dir, SCALER), scaler.state_dict())

    def progress(self) -> dict[str, Any]:
        """How far the training is, beside what transformers notes: sums since the last log line, and over the whole run."""
        return {"loss_since_log": float(self.accelerator.gather(self._tr_loss).mean()),
                "loss_total": self._total_loss_scalar, "last_logged": self._globalstep_last_logged, "seconds": self.seconds}

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in all sessions of the run."""
        return self.seconds_before + time.monotonic() - self._started

    # ---- loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, TRAINABLE))
        mine = {n: p for n, p in (model or self.model).named_parameters() if p.requires_grad}
        # all or nothing: a tensor left at its start would train on from there without a word
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in mine.items()}:
            raise UserError(f"{resume_from_checkpoint}: its trainable tensors are not this model's; give a checkpoint of "
                            "the same model and the same kind of training")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        if self._sharded:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        if wrong := fault(Path(best), self.checkpoint_files):
            raise UserError(f"--load_best_model_at_end: the best checkpoint, {best}, cannot be read again: {wrong}; run the "
                            "command again with --overwrite")
        log.info("taking the best of the validated weights, those of step %s: %s %.5g", self.state.best_global_step,
                 self.args.metric_for_best_model, self.state.best_metric)
        self._load_from_checkpoint(best)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step and self.state.best_model_checkpoint is None:
            # noted with the whole path, which another --output_dir or a moved folder changes
            moved = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(moved) if moved.is_dir() else None
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_rng(Path(checkpoint, f"rng_{self.args.process_index}.safetensors"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", SCALER)
        if checkpoint and file.is_file() and (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            scaler.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # a clock that is set on the way must not count
        self._started = time.monotonic()
        if resume_from_checkpoint is not None:
            file = Path(resume_from_checkpoint, PROGRESS)
            if file.is_file():
                self._resumed = json.loads(file.read_text(encoding="utf-8"))
            else:
                log.warning("%s: has no %s; tokens, seconds and mean losses count from here on", file.parent, PROGRESS)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def restore(self, progress: dict[str, Any]) -> None:
        """Set what ``progress`` gave."""
        self._tr_loss.fill_(progress["loss_since_log"])
        self._total_loss_scalar = progress["loss_total"]
        self._globalstep_last_logged = progress["last_logged"]
        self.seconds_before = progress["seconds"]

    def _restore_once(self) -> None:
        # not before: transformers sets its sums to 0 when the loop begins
        if self._resumed is not None:
            self.restore(self._resumed)
            self._resumed = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore_once()
        # a checkpoint of the step at which early stopping stopped: nothing is left to do
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # again, for a run that was killed behind its last step
        self._restore_once()
        return super()._finalize_training(*args, **kwargs)


@contextlib.contextmanager
def _refused(flag: str) -> Iterator[None]:
    """What a flag asks for in a sentence where it cannot be made: a package lacks, or an argument is not known."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"{flag}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, on the CPU."""
    return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in model.named_parameters() if p.requires_grad}


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Write optimiser moments and both states' plain values."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            # bitsandbytes keeps the tables of its 8-bit moments one level deeper, and all parameters share them: copied
            deeper = isinstance(value, dict)
            leaves = {f"{key}.{k}": v for k, v in value.items()} if deeper else {key: value}
            for name, leaf in ((f"{index}.{k}", v) for k, v in leaves.items()):
                if torch.is_tensor(leaf):
                    tensors[name] = leaf.detach().to("cpu", copy=deeper).contiguous()
                else:
                    plain[name] = leaf
    save_file(tensors, folder / OPTIMIZER)
    # Adam's rates and betas, and where the schedule stands, are plain numbers: JSON needs no pickle for them
    content = {"plain": plain, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restore what ``save_optimizer`` wrote."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*load_file(folder / OPTIMIZER).items(), *content["plain"].items()):
        index, key, *inner = name.split(".")
        # the optimiser numbers its parameters by int; file names and JSON know text only
        values = state.setdefault(int(index), {})
        if inner:
            values.setdefault(key, {})[inner[0]] = value
        else:
            values[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    scheduler.load_state_dict(content["scheduler"])


def save_rng(path: Path) -> None:
    """Write the states of Python's, NumPy's, torch's and CUDA's generators."""
    path.parent.mkdir(parents=True, exist_ok=True)
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    # gauss, cached: the second of a pair of normal draws, which the generators keep for the next call
    plain = {"python": [version, list(words), gauss], "numpy": [int(position), int(has_gauss), float(cached)]}
    save_file(tensors, path, metadata={"plain": json.dumps(plain)})


def load_rng(path: Path) -> None:
    """Restore what ``save_rng`` wrote."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        plain = json.loads(file.metadata()["plain"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    position, has_gauss, cached = plain["numpy"]
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(sum(name.startswith("cuda.") for name in tensors))]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
