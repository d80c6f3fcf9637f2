"""Carry out an export's plan: tensor by tensor inside the memory promise, resumable, whole or not there."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import manifest
from models.checkpoints.header import KINDS, TensorInfo
from models.checkpoints.writer import Layout, Writer
from models.merging.budget import Budget
from models.merging.execute import JOURNAL, execute
from models.merging.merge import DTYPES, PLAN
from models.merging.methods import METHODS
from models.merging.plan import MergePlan


@dataclass
class Rounding:
    """How much of what a run adds is lost when sums are rounded to the type of the file, over all blocks written.

    bfloat16 keeps 8 bits of a weight: more than half of a LoRA's change may drown in them.
    """

    out_dtype: str
    lost: float = 0.0
    size: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, info: TensorInfo, delta: Tensor, total: Tensor) -> None:
        # fp64: squares of small changes vanish beside a large sum in fp32
        lost = float((self._kept(info, total) - total).double().square().sum())
        size = float(delta.double().square().sum())
        with self._lock:
            self.lost, self.size = self.lost + lost, self.size + size

    def _kept(self, info: TensorInfo, total: Tensor) -> Tensor:
        """The values as a reader of the file gets them, fp32."""
        kind = DTYPES.get(self.out_dtype) or ("F16" if self.out_dtype == "q8_0" else info.dtype)
        # a row that 32 does not divide is written in 16 bits
        if self.out_dtype == "q8_0" and not info.shape[-1] % 32:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize, quantize

            packed = quantize(total.reshape(-1, 32).numpy(), GGMLQuantizationType.Q8_0)
            return torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0)).view_as(total)
        return total.to(getattr(torch, KINDS[kind][1])).float()

    @property
    def share(self) -> float:
        """The rounding's norm by the change's."""
        return (self.lost / self.size) ** 0.5 if self.size else 0.0


def write_weights(plan: MergePlan, layout: Layout, cost: Budget, run: manifest.Run, writer: type[Writer] = Writer) -> None:
    """Write the plan's tensors into a run's folder, going on where a killed run of the same plan stopped."""
    # flags and inputs: a resumed export may trust finished tensors only if both are what they were
    identity = {key: value for key, value in run.config.items() if key not in manifest.PLACE}
    ran = stream(run.folder, identity, plan, cost, lambda resume: writer(run.folder, layout, resume))
    run.metrics.update(tensors=len(plan.jobs), tensors_run=ran, bytes_written=layout.total, workers=cost.workers)


def stream(folder: Path, identity: dict[str, Any], plan: MergePlan, cost: Budget, opened: Callable[[bool], Any]) -> int:
    """Run the jobs into a writer and return how many were left; what a killed run of this identity finished is kept.

    Args:
        identity: what the bytes depend on; files of another identity are thrown away.
        opened: makes the writer, told whether to go on with the files that are there.
    """
    resume = manifest.same_plan(folder / PLAN, identity)
    if not resume:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        manifest.write_json(folder / PLAN, identity)
    writer = opened(resume)
    try:
        ran = execute(plan.jobs, METHODS["passthrough"], writer, folder, workers=cost.workers, seed=0,
                      device=torch.device("cpu"), said="exporting")
        writer.finish()
    finally:
        writer.close()
    for name in (PLAN, JOURNAL):
        (folder / name).unlink()
    return ran
