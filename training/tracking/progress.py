"""How a training goes, told to people: a bar on a terminal, and a line at every logging step.

The numbers themselves go to the manifest's history and to the trackers; --verbose tells all of them here too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

import console

log = logging.getLogger(__name__)
#: Part of a loss, or figure of preference pairs -> what it is called, in the order of the line.
_PARTS = {"lm": "language model", "gate": "gate", "share_right": "right expert", "rewards/margins": "margin",
          "rewards/accuracies": "chosen preferred", "anchor": "anchor"}
#: Those that are shares of 1.
_SHARES = ("share_right", "rewards/accuracies")
_DRIFT = "drift_"


def line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """One entry of transformers' log as people read it; empty for one without a loss.

    ``step 20/80  loss 1.52 (language model 1.4, gate 0.9, right expert 71 %)  grad 0.71  lr 2.7e-05``

    Args:
        logs: name -> number.
        step: of how many ``steps``.
    """
    told = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
    before = "eval_" if "eval_loss" in told else ""
    if f"{before}loss" not in told:
        return ""
    # ours of training steps are called loss_NAME, TRL's NAME
    parts = {name.removeprefix(before or "loss_"): value for name, value in told.items()}
    found = figures(parts)
    # the language model alone is the loss
    more = f" ({', '.join(found)})" if found and set(parts) & {*_PARTS} != {"lm"} else ""
    said = [f"step {step}/{steps}", f"{'validation loss' if before else 'loss'} {told[f'{before}loss']:.3g}{more}"]
    if not before:
        steady = {"grad": "grad_norm", "lr": "learning_rate"}
        said += [f"{word} {told[name]:.2g}" for word, name in steady.items() if name in told]
    return "  ".join(said)


def figures(parts: Mapping[str, float]) -> list[str]:
    """Parts of a loss and figures of pairs, by their names in the log, as people read them; others are left out."""
    shares = {name: f"{parts[name]:.0%}".replace("%", " %") for name in _SHARES if name in parts}
    found = [f"{_PARTS[name]} {shares.get(name) or format(parts[name], '.3g')}" for name in _PARTS if name in parts]
    return found + [f"drift of {name.removeprefix(_DRIFT)} {parts[name]:.3g}" for name in parts if name.startswith(_DRIFT)]


class Progress(TrainerCallback):
    """In place of transformers' own, which prints its dictionaries.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: tqdm | None = None
        self.validation: tqdm | None = None
        self.trained = False

    @classmethod
    def of(cls, trainer: Trainer, name: str) -> None:
        """Let ``trainer`` tell of itself in this way and no other."""
        for theirs in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(cls(name))

    def _bar(self, args: Any, total: int, said: str, unit: str, begun: int = 0, leave: bool = True) -> tqdm:
        # in a file the lines tell where it stands
        return tqdm(total=total, initial=begun, desc=said, unit=unit, leave=leave, dynamic_ncols=True,
                    disable=args.disable_tqdm or console.hidden() or None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = False
        if state.is_world_process_zero:
            self.steps = self._bar(args, state.max_steps, self.name, "step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps is not None:
            self.steps.update(state.global_step - self.steps.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.validation is None:
            self.validation = self._bar(args, len(eval_dataloader), "validation", "batch", leave=False)
        self.validation.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.validation is not None:
            self.validation.close()
            self.validation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # after training the kept weights are validated, whichever step they are of: the last screen tells their loss
        if not self.trained and (said := line(logs, state.global_step, state.max_steps)):
            log.info(said)
        log.debug("step %d: %s", state.global_step, dict(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = True
        if self.steps is not None:
            self.steps.close()
            self.steps = None
