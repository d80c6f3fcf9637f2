"""Trainer checkpoints without pickle: trainable weights, optimiser, scheduler and random states.

Tensors go into safetensors, the rest into JSON. Sharded back ends (DeepSpeed, FSDP) keep their own formats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "resume_state.json"


class SafeCheckpoints:
    """Mix into a ``transformers.Trainer``: set ``save_artifact`` to write what inference loads."""

    save_artifact: Callable[[Path], None]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable(self.model), folder / TRAINABLE)
        self.save_artifact(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, TRAINABLE))
        mine = {n: p for n, p in (model or self.model).named_parameters() if p.requires_grad}
        # all or nothing: a tensor left at its start would train on from there without a word
        if set(saved) != set(mine):
            raise ValueError(f"{resume_from_checkpoint}: its trainable tensors are not this model's")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        # one process writes for all: under DDP they hold the same moments
        elif self.args.should_save:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        # a file for each process: every one draws its own dropout
        save_rng(Path(output_dir, f"rng_{self.args.process_index}.safetensors"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_rng(Path(checkpoint, f"rng_{self.args.process_index}.safetensors"))


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, on the CPU."""
    return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in model.named_parameters() if p.requires_grad}


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Write optimiser moments and both states' plain values."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{key}"] = value
    save_file(tensors, folder / OPTIMIZER)
    # Adam's rates and betas, and where the schedule stands, are plain numbers: JSON needs no pickle for them
    content = {"plain": plain, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restore what ``save_optimizer`` wrote."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*load_file(folder / OPTIMIZER).items(), *content["plain"].items()):
        index, key = name.split(".", 1)
        # the optimiser numbers its parameters by int; file names and JSON know text only
        state.setdefault(int(index), {})[key] = value
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
