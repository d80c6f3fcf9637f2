"""A trained mask as numbers between 0 and 1: drawn, expected, cut at a threshold or at a share, averaged over draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.mask.concrete import hard_mask, noise, soft_mask
from models.mask.settings import Readout, Settings


def read_out(logits: Mapping[str, Tensor], settings: Settings, readout: Readout, seed: int = 0,
             ) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, mask of its units (units,) in fp32), one by one; not rescaled.

    Args:
        seed: of the draws; a function of (seed, tensor, index) alone. Read-outs that draw nothing ignore it.
    """
    if readout.kind == "top":
        # the only read-out that no tensor can tell by itself
        yield from _largest_share(logits, readout.value).items()
        return
    for name, values in logits.items():
        yield name, _mask(name, values, settings.temperature, readout, seed)


def _mask(name: str, logits: Tensor, temperature: float, readout: Readout, seed: int) -> Tensor:
    """One tensor's mask, (units,)."""
    logits = logits.float()
    if readout.kind == "expected":
        return torch.sigmoid(logits)
    if readout.kind == "threshold":
        return (logits > readout.value).float()
    draws = int(readout.value) if readout.kind == "average" else 1
    total = torch.zeros_like(logits)
    for draw in range(draws):
        bits = noise(f"{seed}|readout|{draw}|{name}", 0, logits.numel(), logits.device).view(logits.shape)
        total += hard_mask(logits, bits) if readout.kind == "hard" else soft_mask(logits, bits, temperature)
    return total / draws


def _largest_share(logits: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Ones for exactly share x units, at least one, of the largest logits over all tensors; of equal ones, the first."""
    flat = torch.cat([value.float().reshape(-1) for value in logits.values()])
    wanted = max(1, round(share * flat.numel()))
    smallest_kept = flat.kthvalue(flat.numel() - wanted + 1).values
    kept = flat > smallest_kept
    # an untrained mask is all ties: without this its "half" would be the whole
    ties = (flat == smallest_kept).nonzero().squeeze(1)
    kept[ties[:wanted - int(kept.sum())]] = True
    pieces = kept.split([value.numel() for value in logits.values()])
    return {name: piece.view(value.shape).float() for (name, value), piece in zip(logits.items(), pieces, strict=True)}
