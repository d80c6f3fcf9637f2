"""Trainer checkpoints without pickle: trainable weights, optimiser, scheduler, random states, and how far the training is.

Tensors go into safetensors, the rest into JSON. A checkpoint is written aside and renamed when it is whole. What FSDP2 has
in parts goes there in parts (models/checkpoints/parts.py); either kind is read by any number of processes, parted or
not. DeepSpeed keeps its own format.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import _getdtype as safetensors_dtype
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import ExportableState

import manifest
from errors import SharedError, UserError
from models.base.parted import own_part
from models.checkpoints import parts
from training.distributed.processes import ManyProcesses
from training.distributed.sharding import is_sharded
from training.resume import fault, rotate

log = logging.getLogger(__name__)
TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "resume_state.json"
PROGRESS, SCALER = "progress.json", "scaler.json"


class SafeCheckpoints(ManyProcesses):
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
        # the random states of one process at least: another number of them may go on from there
        return [] if self.is_deepspeed_enabled else [STATE, "rng_0.safetensors"]

    @property
    def weight_places(self) -> list[tuple[str, str]]:
        """What holds (weights, optimiser) of a checkpoint: files, or folders of parts."""
        return [] if self.is_deepspeed_enabled else [(self.weights_file, parts.WEIGHTS), (OPTIMIZER, parts.OPTIMIZER)]

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
        if self.is_deepspeed_enabled:
            return
        mine = self._trained()
        names = list(mine)
        broken = next((i for i, name in enumerate(names)
                       if not torch.isfinite(own_part(mine[name])).all()), None)
        # by number: of a parted weight one process alone may hold what is broken
        if found := self.first_of_all(0 if broken is None else broken + 1, 0.0):
            raise SharedError(
                f"{names[found[0] - 1]} is no longer finite at step {self.state.global_step}, so no checkpoint of it is "
                f"kept; lower --learning_rate (now {self.args.learning_rate}), or use --dtype float32")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not (self.args.should_save or self._all_save):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if is_sharded(self.model):
            parts.save(folder / parts.WEIGHTS, self._trained())
        elif not self.is_deepspeed_enabled:
            save_file(trainable(self.model), folder / TRAINABLE)
        self.save_artifact(folder)

    @property
    def _all_save(self) -> bool:
        """Whether every process has something to write, or a part to give."""
        return is_sharded(self.model) or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # transformers asks the first process alone where it sees no FSDP; all have parts to write
        if self._all_save:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _trained(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        # one process writes for all: under DDP they hold the same moments
        elif self.args.should_save or is_sharded(self.model):
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
        place, mine = held(Path(resume_from_checkpoint), TRAINABLE, parts.WEIGHTS), self._trained()
        shapes = {n: shape for n, (shape, _) in place.stored().items()}
        # all or nothing: a tensor left at its start would train on from there without a word
        if shapes != {n: p.shape for n, p in mine.items()}:
            raise UserError(f"{resume_from_checkpoint}: its trainable tensors are not this model's; give a checkpoint of "
                            "the same model and the same kind of training")
        with torch.no_grad():
            place.load(mine)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        if wrong := fault(Path(best), self.checkpoint_files, self.weight_places):
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
        if checkpoint and self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", f"rng_{self.args.process_index}.safetensors")
        if checkpoint and file.is_file():
            load_rng(file)
        elif checkpoint:
            # started on fewer processes: this one draws as the seed says
            log.info("%s: has no random states of process %d, which draws its dropout anew", checkpoint,
                     self.args.process_index)

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
        # a run that was killed behind its last checkpoint: transformers would train a step more in an epoch begun
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
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


@dataclass(frozen=True)
class Held:
    """Where tensors of a checkpoint lie: a file of whole ones, or a folder of parts."""

    path: Path

    def stored(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        if self.path.is_dir():
            return parts.stored(self.path)
        with safe_open(self.path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (torch.Size(s.get_shape()), safetensors_dtype(s.get_dtype())) for name, s in slices.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors, parted or whole, in place."""
        if self.path.is_dir():
            parts.load(self.path, tensors)
            return
        with safe_open(self.path, "pt") as file:
            for name, tensor in tensors.items():
                parts.copy_whole(tensor, file.get_tensor(name))


def held(checkpoint: Path, file: str, folder: str) -> Held:
    return Held(checkpoint / folder if (checkpoint / folder).is_dir() else checkpoint / file)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, on the CPU."""
    return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in model.named_parameters() if p.requires_grad}


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any, shared: bool = False) -> None:
    """Write optimiser moments and both states' plain values; where moments are parted or shared out, every process must ask.

    Args:
        shared: whether each process has the moments of parameters of its own (``training/distributed/moments.py``).
    """
    state = optimizer.state_dict()
    tensors, parted, plain = {}, {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            # bitsandbytes keeps the tables of its 8-bit moments one level deeper, and all parameters share them: copied
            deeper = isinstance(value, dict)
            leaves = {f"{key}.{k}": v for k, v in value.items()} if deeper else {key: value}
            for name, leaf in ((f"{index}.{k}", v) for k, v in leaves.items()):
                if not torch.is_tensor(leaf):
                    plain[name] = leaf
                elif hasattr(leaf, "full_tensor"):
                    parted[name] = leaf.detach()
                else:
                    tensors[name] = leaf.detach().to("cpu", copy=deeper).contiguous()
    if parted or shared:
        # counts of steps are whole, and the same everywhere
        parts.save(folder / parts.OPTIMIZER, parted | tensors)
        if not manifest.is_main():
            return
    else:
        save_file(tensors, folder / OPTIMIZER)
    # Adam's rates and betas, and where the schedule stands, are plain numbers: JSON needs no pickle for them
    content = {"plain": plain, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any, own: Container[int] | None = None) -> None:
    """Restore what ``save_optimizer`` wrote; ``own``: of the parameters of these numbers alone."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    place = held(folder, OPTIMIZER, parts.OPTIMIZER)
    # by their numbers, which are those of the state
    parameters = dict(enumerate(p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]))
    tensors = {name: _room(name, shape, dtype, parameters) for name, (shape, dtype) in place.stored().items()
               if own is None or int(name.partition(".")[0]) in own}
    place.load(tensors)
    for name, value in (*tensors.items(), *content["plain"].items()):
        index, key, *inner = name.split(".")
        if torch.is_tensor(value):
            value = parts.in_shape_of(value, parameters.get(int(index)))
        # the optimiser numbers its parameters by int; file names and JSON know text only
        values = state.setdefault(int(index), {})
        if inner:
            values.setdefault(key, {})[inner[0]] = value
        else:
            values[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    scheduler.load_state_dict(content["scheduler"])


def _room(name: str, shape: torch.Size, dtype: torch.dtype, parameters: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A tensor for a value of the optimiser, parted as its parameter is where it has that one's shape."""
    parameter = parameters.get(int(name.partition(".")[0]))
    if parameter is not None and hasattr(parameter, "full_tensor") and parameter.shape == shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype)


def save_rng(path: Path) -> None:
    """Write the states of Python's, NumPy's, torch's and CUDA's generators."""
    path.parent.mkdir(parents=True, exist_ok=True)
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    # gauss: the second of a pair of normal draws, which the generators keep for the next call
    plain = {"python": [version, list(words), gauss],
             "numpy": [int(numpy["state"]["pos"]), int(numpy["has_gauss"]), float(numpy["gauss"])]}
    save_file(tensors, path, metadata={"plain": json.dumps(plain)})


def load_rng(path: Path) -> None:
    """Restore what ``save_rng`` wrote."""
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
