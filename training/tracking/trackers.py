"""--report_to tensorboard|wandb: losses of a training as they come, its name and its settings; nothing of it is trained on.

What transformers would log is logged: every part of the loss by its own name (loss_lm, loss_gate, loss_drift_safety, the
rewards of DPO, the mask's numbers), the learning rate, validation. Models and checkpoints go nowhere. Trackers beside these
two are transformers' own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

import manifest
from errors import UserError
from flags import AlignArgs
from flags.optimiser import OWN_TRACKERS, trackers_of

#: wandb's project where WANDB_PROJECT names none.
PROJECT = "alignment-by-fusion"


class Tracker(TrainerCallback):
    """Gives every number that a trainer logs to ``write``, by transformers' names: train/loss, eval/loss."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        values = {f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
                  for name, value in (logs or {}).items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self.write(values, state.global_step)

    def write(self, values: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in ``folder``, a new one at each start: a resumed run goes on where its steps do."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / name / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
        self.writer.add_text("run", name)
        # indented by four: a block of code in TensorBoard's Markdown
        text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # a killed training leaves what it told so far
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY and its other variables count as ever."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=dict(settings),
                                  dir=str(folder))
        except Exception as error:  # wandb's own, requests', a plain RuntimeError: one sentence is wanted
            said = manifest.public(" ".join(str(error).split())[:200])
            raise UserError(f"--report_to wandb: no run could be opened ({type(error).__name__}: {said}); check "
                            "WANDB_API_KEY and the network, or export WANDB_MODE=offline") from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


#: Name -> its class; the names are those of OWN_TRACKERS.
TRACKERS: dict[str, type[Tracker]] = dict(zip(OWN_TRACKERS, (TensorBoard, Wandb), strict=True))


@contextlib.contextmanager
def tracking(trainer: Any, args: AlignArgs, extra: Mapping[str, Any]) -> Iterator[None]:
    """Let ``trainer`` tell the trackers of --report_to while the block runs; of several processes only the first does.

    Raises:
        UserError: a tracker cannot be opened.
    """
    asked = [name for name in trackers_of(extra) if name in TRACKERS] if manifest.is_main() else []
    settings = manifest.public(args.settings(dict(extra)))
    opened: list[Tracker] = []
    failed = True
    try:
        for name in asked:
            with _chance_untouched():
                opened.append(TRACKERS[name](args.name, settings, args.results / "tracking"))
            trainer.add_callback(opened[-1])
        yield
        failed = False
    finally:
        for tracker in opened:
            tracker.close(failed)


@contextlib.contextmanager
def _chance_untouched() -> Iterator[None]:
    """A tracker may draw a name: the training's own draws must not notice."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
