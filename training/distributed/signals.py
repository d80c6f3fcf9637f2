"""--save_on_signal: SIGTERM, a scheduler's word before it ends a job, ends a training behind a whole checkpoint."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

log = logging.getLogger(__name__)
#: As a shell tells of a process that SIGTERM ended.
EXIT = 128 + signal.SIGTERM


class SaveOnSignal(TrainerCallback):
    """Ends the step in which any process is told to end, saves on all, and stops.

    transformers' own (enable_jit_checkpoint) asks each process for itself: one that saves at another step than its neighbour
    waits for it for ever.

    Args:
        processes: how many train; all of them make one of these.
    """

    def __init__(self, processes: int) -> None:
        self.told = self.saved = False
        # of the host's own: a step's kernels are not waited for
        self._group = dist.new_group(backend="gloo") if processes > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it SIGTERM is noted; a second one, which launchers and schedulers send after another, too."""
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, *_: Any) -> None:
        self.told = True

    def _stops(self, state: Any) -> bool:
        # behind the last step the run itself is written
        return self.told and state.global_step < state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._group is not None:
            told = torch.tensor(int(self.told))
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
            self.told = bool(told)
        if self._stops(state):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stops(state):
            # now and not before: the checkpoint would say that its training had been stopped
            control.should_training_stop, control.should_save, self.saved = True, False, True
            if state.is_world_process_zero:
                log.warning("SIGTERM: stopped behind step %d, whose checkpoint is whole; the same command goes on from "
                            "there", state.global_step)
