"""Rows that no step trains on: which ones they are, what is measured on them, and when training stops for them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback

from data.records import Pair, Record, Row, normalise
from errors import UserError
from flags.align import AlignArgs
from flags.data import DataFlags
from flags.validation import ValidationFlags

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # what it is mixed into brings its own, transformers' or TRL's

log = logging.getLogger(__name__)


def divide(args: AlignArgs, rows: list[Row], read: Callable[[AlignArgs], list[Row]]) -> tuple[list[Row], list[Row]]:
    """The rows to train on and, of own data, those to validate on: --validation_path's, or --validation_share of ``rows``.

    Args:
        read: the training rows of flags whose --data_path is the validation file.

    Raises:
        UserError: the file has problems or holds nothing but training rows; the share leaves nothing on a side.
    """
    # a search without gradients validates nothing; whatever validates reads data
    if not isinstance(args, ValidationFlags) or not isinstance(args, DataFlags):
        return rows, []
    if args.validation_path:
        held_out = read(args.reading(args.validation_path))
        seen = {_key(row) for row in rows}
        if known := sum(_key(row) in seen for row in held_out):
            if known == len(held_out):
                raise UserError(f"--validation_path {args.validation_path}: every prompt of it is trained on too; give "
                                "other rows, or --validation_share instead")
            log.warning("validation data: %d of %d prompts are trained on too", known, len(held_out))
        return rows, held_out
    if args.validation_share is None:
        return rows, []
    train, held_out = share_of(rows, args.validation_share, args.seed)
    if not train or not held_out:
        raise UserError(f"--validation_share {args.validation_share}: of {len(rows)} rows with "
                        f"{len({_key(row) for row in rows})} different prompts none is left to "
                        f"{'train' if not train else 'validate'} on; give another share, or --validation_path")
    log.info("validation data: %d of %d rows, by the hash of their prompts and --seed", len(held_out), len(rows))
    return train, held_out


def share_of(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out): of each objective the prompts with the smallest hashes, until the share is reached.

    All rows of a prompt lie on one side, and neither the order of the rows nor rows of other prompts decide on which.
    """
    held_out: set[tuple[int, str]] = set()
    for objective in {row.objective for row in rows}:
        counts: dict[str, int] = {}
        for row in rows:
            if row.objective == objective:
                counts[_key(row)] = counts.get(_key(row), 0) + 1
        wanted, taken = max(1, round(share * sum(counts.values()))), 0
        for key in sorted(counts, key=lambda key: hashlib.sha256(f"{seed}|{key}".encode()).digest()):
            if taken >= wanted:
                break
            held_out.add((objective, key))
            taken += counts[key]
    chosen = [(row.objective, _key(row)) in held_out for row in rows]
    return ([row for row, out in zip(rows, chosen, strict=True) if not out],
            [row for row, out in zip(rows, chosen, strict=True) if out])


def _key(row: Record | Pair) -> str:
    return normalise(f"{row.prompt}\n{row.input}")


class WholeMeans(Trainer):
    """Mix into a ``transformers.Trainer``: validation figures are means over all rows, however these fall into batches.

    transformers takes the mean of the batches' means, in which a short last batch weighs as much as a full one, and leaves a
    NaN out. An evaluation draws no random numbers of the training's.
    """

    _sums: dict[str, list[float]]

    def validation_terms(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[float, int]]:
        """Of one batch, without gradients: name -> (sum, of how many); one is named "loss"."""
        raise NotImplementedError

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        # every process reads all rows: shared out, the last batch would be filled up with rows that were there before
        return DataLoader(self.eval_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)

    @contextlib.contextmanager
    def _outside_training(self) -> Iterator[None]:
        # of what processes gather, accelerate drops as many rows as the last batch of the training's loader was filled with
        state = self.accelerator.gradient_state
        loaders = state.dataloader_references
        state.dataloader_references = [*loaders, None]
        try:
            yield
        finally:
            state.dataloader_references = loaders

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[None, None, None]:
        with torch.no_grad():
            for name, (value, count) in self.validation_terms(model, self._prepare_inputs(inputs)).items():
                total = self._sums.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += count
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._sums = {}
        devices = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._outside_training():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # a process for itself would find another best checkpoint than its neighbour
        parts = gather_object([self._sums]) if self.args.world_size > 1 else [self._sums]
        means = {name: sum(part[name][0] for part in parts) / max(sum(part[name][1] for part in parts), 1)
                 for name in self._sums}
        if not torch.isfinite(torch.tensor(means["loss"])):
            raise UserError(f"the validation loss is {means['loss']} at step {self.state.global_step}; lower --learning_"
                            f"rate (now {self.args.learning_rate}), or use --dtype float32")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def validate(self) -> dict[str, float]:
        """Every figure of the validation rows, "loss" among them."""
        found = self.evaluate()
        return {name: found[f"eval_{name}"] for name in self._sums}


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count survives a resume."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                control.should_training_stop = True
