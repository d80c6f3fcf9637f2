"""Commands in several processes of one launch: what tests start with torchrun.

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/two_processes.py runs.json

The file lists runs, {"words": [...], "fsdp": true or false, "nan_on": rank whose second step shall give a NaN}; beside it
each process writes the losses of its steps. Starting Python and torch takes longer than a run of a pico model, so one
launch does them all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def run(words: list[str], fsdp: bool = False, nan_on: int | None = None) -> list[float]:
    """One training, as its command line in a launch of its own would do it; the losses of its steps on this process.

    Logged ones are rounded, and several processes log their mean.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer

    import align_basemodel
    from training.answers import AnswerModel

    # as accelerate launch --config_file scripts/accelerate/fsdp2.yaml sets them
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}.items():
        if fsdp:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    # a launch has one training; the processes stay connected
    AcceleratorState._reset_state()
    GradientState._reset_state()
    losses: dict[int, float] = {}
    step = Trainer.training_step

    def recorded(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        # of micro-batches transformers adds the parts of a step up
        losses[self.state.global_step] = losses.get(self.state.global_step, 0.0) + float(loss)
        return loss

    answer, passes = AnswerModel.forward, []

    def broken(self, *args, **kwargs):
        passes.append(1)
        parts = answer(self, *args, **kwargs)
        return parts | {"lm": parts["lm"] * (float("nan") if len(passes) > 1 else 1.0)}

    Trainer.training_step = recorded
    if nan_on is not None and os.environ.get("RANK") == str(nan_on):
        AnswerModel.forward = broken
    try:
        align_basemodel.main(words)
    finally:
        Trainer.training_step, AnswerModel.forward = step, answer
    return [losses[number] for number in sorted(losses)]


def main(file: str) -> None:
    found = []
    for item in json.loads(Path(file).read_text(encoding="utf-8")):
        found.append(run(item["words"], item["fsdp"], item.get("nan_on")))
        # after each: what stands there when a launch ends early tells how far it came
        Path(f"{file}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
