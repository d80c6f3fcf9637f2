"""A trained mask as numbers between 0 and 1: drawn, expected, cut at a threshold or at a share, averaged over draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.mask.concrete import hard_mask, noise, soft_mask
from models.mask.settings import Readout, Settings


def read_out(logits: Mapping[str, Tensor], settings: Settings, readout: Readout, seed: int = 0,
             ) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, mask of its units in fp32), one by one; not rescaled.

    Args:
        seed: of the draws; a function of (seed, tensor, index) alone. Read-outs that draw nothing ignore it.
    """
    cut = _share_cut(logits, readout.value) if readout.kind == "top" else None
    for name, values in logits.items():
        if readout.kind == "top":
            yield name, cut[name]
        else:
            yield name, _mask(name, values, settings.temperature, readout, seed)


def _mask(name: str, logits: Tensor, temperature: float, readout: Readout, seed: int) -> Tensor:
    logits = logits.float()
    if readout.kind == "expected":
        return torch.sigmoid(logits)
    if readout.kind == "threshold":
        return (logits > readout.value).float()
    draws = int(readout.value) if readout.kind == "average" else 1
    total = torch.zeros_like(logits)
    for i in range(draws):
        bits = noise(f"{seed}|readout|{i}|{name}", 0, logits.numel(), logits.device).view(logits.shape)
        total += hard_mask(logits, bits) if readout.kind == "hard" else soft_mask(logits, bits, temperature)
    return total / draws


def _share_cut(logits: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Ones for exactly share x units of the largest logits over all tensors; of equal ones, the first in order."""
    flat = torch.cat([value.float().reshape(-1) for value in logits.values()])
    wanted = max(1, round(share * flat.numel()))
    limit = flat.kthvalue(flat.numel() - wanted + 1).values
    keep = flat > limit
    ties = (flat == limit).nonzero().squeeze(1)
    keep[ties[:wanted - int(keep.sum())]] = True
    found, first = {}, 0
    for name, value in logits.items():
        found[name] = keep[first:first + value.numel()].view(value.shape).float()
        first += value.numel()
    return found
