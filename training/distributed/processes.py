"""A trainer of several processes: what each holds, what they agree on, and who reduces the gradients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flags.launch import Sharding
from models.base.parted import own_part
from training.distributed.sharding import is_sharded, reshard, shard

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # what it is mixed into brings its own, transformers' or TRL's


class ManyProcesses(Trainer):
    """Mix into a ``transformers.Trainer``: DDP by accelerate, FSDP2 by ``shard``, values of all processes."""

    @property
    def sharding(self) -> Sharding | None:
        """How the model is to be parted; None: every process holds all of it."""
        return getattr(self.args, "sharding", None)

    @property
    def _reduces_itself(self) -> bool:
        """Whether gradients are averaged without DDP."""
        return self.sharding is not None

    def shard(self) -> None:
        """Part the model, where that was asked for, and once."""
        if self.sharding is not None and not is_sharded(self.model):
            shard(self.model, self.sharding, self.args.device)

    # ---- transformers' hooks

    def create_accelerator_and_postprocess(self) -> None:
        with _unsharded_by_accelerate():
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # as a whole it may be larger than a device
        if self.sharding is None:
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # transformers' word for a model that needs no wrapper: accelerate would put DDP around it
        self.is_distributed_loading_by_transformers = self._reduces_itself
        reshard(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        found = super().evaluation_loop(*args, **kwargs)
        reshard(self.model)
        return found

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: FSDP2 reduces what is parted, and a trainer that reduces by itself knows what."""

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        # of the micro-batches of a step only the last one's gradients go round, as under DDP
        return _unreduced(self.model)

    # ---- values of all processes

    def mean_of_all(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The mean over processes of named values that each has; every process must ask with the same names."""
        names = sorted(values)
        if not names:
            return {}
        if self.args.world_size == 1:
            return {name: float(values[name]) for name in names}
        device = self.args.device
        # one message and one wait for the device, however many they are
        stacked = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, (stacked / self.args.world_size).tolist(), strict=True))

    def first_of_all(self, step: int, value: float) -> tuple[int, float] | None:
        """The smallest step above 0 that any process tells, and that process's value; None where all say 0."""
        if self.args.world_size == 1:
            return (step, value) if step else None
        told = torch.tensor([step, value], dtype=torch.float64, device=self.args.device)
        all_told = [torch.empty_like(told) for _ in range(self.args.world_size)]
        dist.all_gather(all_told, told)
        found = [(int(s), v) for s, v in (pair.tolist() for pair in all_told) if s > 0]
        return min(found, key=lambda pair: pair[0]) if found else None

    def held_bytes(self) -> int:
        """Bytes of weights and optimiser state that this process holds."""
        state = [value for values in self.optimizer.state_dict()["state"].values() for value in values.values()]
        tensors = [*self.model.parameters(), *(value for value in state if torch.is_tensor(value))]
        return sum(part.numel() * part.element_size() for part in map(own_part, tensors))


@contextlib.contextmanager
def _unreduced(model: nn.Module) -> Iterator[None]:
    """Within it gradients stay in their process."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextlib.contextmanager
def _unsharded_by_accelerate() -> Iterator[None]:
    """Within it accelerate does not see that its configuration asks for FSDP: ``shard`` does that."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked
