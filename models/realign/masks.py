"""Realignment by a trained mask, and by the same mask at random places: the control that a trained mask must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import manifest
from errors import UserError
from flags.realign import RealignArgs
from models.mask.export import masked_adapter, masked_deltas, open_mask
from models.mask.files import LOGITS, Mask
from models.mask.settings import Readout, parse_readout
from models.operators.low_rank import Pair
from models.realign.walk import Change, Inputs
from models.task_vectors import vector


@dataclass(frozen=True)
class Masked:
    """A mask, read out: its models, and what it makes of their task vectors."""

    folder: Path
    mask: Mask
    readout: Readout
    seed: int
    inputs: Inputs

    @property
    def sha256(self) -> str:
        return manifest.sha256(self.folder / LOGITS)

    def changes(self) -> Iterator[Change]:
        """The masked and merged change of every weight."""
        aligned, tasks = self.inputs.aligned, self.inputs.tasks
        for name, fused in masked_deltas(self.folder, self.readout, self.seed, (aligned, tasks), self.mask):
            deltas = [delta for task in tasks if (delta := vector(task, aligned, name)) is not None]
            yield Change(name, fused, float(sum(deltas).double().square().sum()) if deltas else 0.0, {})

    def adapter(self) -> dict[str, Pair] | None:
        """The result as a LoRA without loss; None where the mask acts on single entries of the weights."""
        return masked_adapter(self.folder, self.readout, self.seed, (self.inputs.aligned, self.inputs.tasks), self.mask)


def open_masked(args: RealignArgs, stack: ExitStack) -> Masked:
    """The mask that --mask names with its models, each checked by hash; shuffled for --method random_mask.

    Raises:
        UserError: no mask, an unknown read-out, models that are gone or are not those it was trained on.
    """
    # sigmoid(s) needs no draw, so that the default result is one model and not a sample of many
    readout = parse_readout(args.readout or "expected")
    run = args.results / "outputs" / args.mask
    folder = run if "/" not in args.mask else Path(args.mask).expanduser()
    mask, aligned, tasks = open_mask(folder, args, stack, args.aligned or None, args.task_names or None)
    # the control shares values, read-out and models with the mask; only the places differ
    if args.method == "random_mask":
        mask = shuffled(mask, args.seed)
    return Masked(folder, mask, readout, args.seed, Inputs(aligned, tuple(tasks)))


def shuffled(mask: Mask, seed: int) -> Mask:
    """The mask with its logits permuted within each tensor: the same values, read out alike, at places that mean nothing."""
    if all(values.numel() == 1 for values in mask.logits.values()):
        raise UserError("--method random_mask: this mask has one logit per tensor, which no permutation within a tensor "
                        "moves; give --parameters kept=SHARE instead of --mask")
    logits = {}
    for name, values in mask.logits.items():
        # a seed of its own per tensor, of 56 bits: torch takes 63
        key = hashlib.blake2b(f"{seed}|shuffle|{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        # within a tensor: across tensors the control would also move mass between layers
        order = torch.randperm(values.numel(), generator=generator)
        logits[name] = values.reshape(-1)[order].view(values.shape)
    return replace(mask, logits=logits)
