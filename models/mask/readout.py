"""A trained mask as numbers between 0 and 1: drawn, expected, cut at a threshold or at a share, averaged over draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from models.mask.concrete import hard_mask, noise, soft_mask
from models.mask.settings import Readout, Settings
from models.operators.selection import descend
from models.operators.spans import BLOCK

#: Bins of the upper and of the lower half of a logit's 32 bits.
_HALF = 1 << 16


def read_out(logits: Mapping[str, Tensor], settings: Settings, readout: Readout, seed: int = 0,
             ) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, mask of its units (units,) in fp32), one by one; not rescaled.

    Args:
        seed: of the draws; a function of (seed, tensor, index) alone. Read-outs that draw nothing ignore it.
    """
    if readout.kind == "top":
        # the only read-out that no tensor can tell by itself
        yield from _largest_share(logits, readout.required_value)
        return
    for name, values in logits.items():
        yield name, _mask(name, values, settings.temperature, readout, seed)


def _mask(name: str, logits: Tensor, temperature: float, readout: Readout, seed: int) -> Tensor:
    """One tensor's mask, (units,)."""
    logits = logits.float()
    if readout.kind == "expected":
        return torch.sigmoid(logits)
    if readout.kind == "threshold":
        return (logits > readout.required_value).float()
    draws = int(readout.required_value) if readout.kind == "average" else 1
    total = torch.zeros_like(logits)
    for draw in range(draws):
        bits = noise(f"{seed}|readout|{draw}|{name}", 0, logits.numel(), logits.device).view(logits.shape)
        total += hard_mask(logits, bits) if readout.kind == "hard" else soft_mask(logits, bits, temperature)
    return total / draws


def _largest_share(logits: Mapping[str, Tensor], share: float) -> Iterator[tuple[str, Tensor]]:
    """Ones for exactly share x units, at least one, of the largest logits over all tensors; of equal ones, the first.

    First in the order of tensors, within one by index; 0 and -0 are equal. Radix selection in two walks and two tables of
    2^16 counts, so that beside one tensor's mask nothing is held, however many logits there are; no NaN among them.
    """
    units = sum(value.numel() for value in logits.values())
    if not units:
        yield from ((name, value.float()) for name, value in logits.items())
        return
    wanted = max(1, round(share * units))
    upper, rest = descend(_counts(logits, lambda keys: (keys >> 16) + _HALF // 2), wanted)
    within = upper - _HALF // 2
    lower, ties = descend(_counts(logits, lambda keys: keys[keys >> 16 == within] & 0xFFFF), rest)
    threshold = within << 16 | lower
    for name, value in logits.items():
        mask = torch.empty(value.shape, device=value.device)
        for keys, kept in zip(_ordered(value), mask.view(-1).split(BLOCK), strict=True):
            chosen = keys > threshold
            # an untrained mask is all ties: without this its "half" would be the whole
            if ties:
                places = (keys == threshold).nonzero().squeeze(1)[:ties]
                chosen[places] = True
                ties -= len(places)
            kept.copy_(chosen)
        yield name, mask


def _counts(logits: Mapping[str, Tensor], bins: Callable[[Tensor], Tensor]) -> Tensor:
    """How many logits fall into each of 2^16 ``bins``, (2^16,) int64 on the CPU."""
    counts = torch.zeros(_HALF, dtype=torch.int64)
    for value in logits.values():
        for keys in _ordered(value):
            counts += torch.bincount(bins(keys), minlength=_HALF).cpu()
    return counts


def _ordered(logits: Tensor) -> Iterator[Tensor]:
    """Blocks of int32 that order as the logits do as fp32."""
    for block in logits.detach().reshape(-1).split(BLOCK):
        # + 0 makes 0 of -0; below 0 a larger pattern is a smaller number, so all bits but the sign are turned over
        bits = (block.float() + 0.0).view(torch.int32)
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)
