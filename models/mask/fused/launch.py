"""When a GPU's kernels serve a mask, and their launches: two a tensor for a draw, two or three for its gradient.

They serve masks with a logit per entry, or one that neighbours in a row share, on task vectors whose sum is known beforehand
(``Rule.linear``); everything else goes by ``bank.py``'s own operations. A step of bfloat16 logits is one kernel. The noise
is Triton's Philox, another stream than a CPU's and than torch's on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.base.parted import is_parted
from models.mask.live import Draw, Slot
from models.mask.rescale import RESCALINGS, moving_expectation, moving_mean
from models.mask.settings import Settings
from models.operators.noise import device_seed

#: Counters of a program's block; each gives 8 entries 16 bits, or 4 entries 32.
_SUB = 256
#: Programs of a launch at most: a few for each of a large GPU's processors, and as many parts of a sum as one program adds.
_PROGRAMS = 1024
#: Entries of a tensor whose places the kernels count in 32 bits.
_MOST = 1 << 30


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def grid(entries: int, block: int) -> tuple[int, int]:
    """(programs, blocks that each of them walks)."""
    blocks = max(1, -(-entries // block))
    steps = -(-blocks // _PROGRAMS)
    return -(-blocks // steps), steps


class FusedDraws:
    """The kernels of a bank, and the device's numbers that a backward pass needs of its forward pass.

    Args:
        slots: of the bank, all on one device.
    """

    def __init__(self, slots: Sequence[Slot], settings: Settings, device: torch.device) -> None:
        self.settings, self.rescaling = settings, RESCALINGS[settings.rescale]
        self.scaled = self.rescaling.measured is not None
        # read and counted on the device: the host waits for none of it
        self.scales = torch.ones(len(slots), device=device)
        self.zeros = torch.zeros(len(slots), dtype=torch.int32, device=device)
        self.parts = torch.zeros(_PROGRAMS, device=device)

    @property
    def zero_masks(self) -> int:
        """Masks that were zero throughout so far; waits for the device."""
        return int(self.zeros.sum())

    def fits(self, slot: Slot, draw: Draw) -> bool:
        """Whether the kernels can do this slot's draw."""
        units = slot.spec.units
        return (units is not None and units.index is None and units.rows == 1 and self.settings.rule.linear
                and not self.rescaling.joint and not draw.expected
                and slot.live.numel() < _MOST and slot.live.is_contiguous()
                and slot.live.dtype in (torch.float32, torch.bfloat16, torch.float16))

    def serves(self, slot: Slot, draw: Draw) -> bool:
        """Whether a draw goes to the kernels: it lies on one GPU, Triton is there, and they can do it."""
        return slot.live.is_cuda and not is_parted(slot.live) and has_triton() and self.fits(slot, draw)

    def write(self, slot: Slot, logits: Tensor, draw: Draw) -> None:
        """theta_s + a m delta into the live weights."""
        from models.mask.fused import kernels

        numbers, sizes = _numbers(slot, draw)
        trained = {"TRAINED": draw.trained}
        if not slot.spec.required_units.single:
            mask = self._unit_mask(slot, logits, draw)
            programs, steps = grid(slot.live.numel(), 8 * _SUB)
            with torch.cuda.device_of(logits):
                kernels.write_units[programs,](
                    slot.live, slot.base, slot.deltas[0], mask, self.parts, sizes[0], self.scales, self.zeros,
                    slot.logits_index, slot.live.numel(), steps, *_layout(slot), SCALED=self.scaled, PARTS=_PROGRAMS,
                    SUB=_SUB)
            return
        with torch.cuda.device_of(logits):
            if self.scaled:
                kernels.measure[sizes[0],](logits, self.parts, *numbers, **_kinds(draw), **trained, HARD=draw.hard,
                                           EXPECTED=self.rescaling.expected, SUB=_SUB)
            kernels.write[sizes[0],](
                slot.live, slot.base, slot.deltas[0], logits, self.parts, sizes[0], self.scales, self.zeros,
                slot.logits_index, *numbers, **_kinds(draw), **trained, HARD=draw.hard, SCALED=self.scaled, PARTS=_PROGRAMS,
                SUB=_SUB)

    def backward(self, slot: Slot, logits: Tensor, draw: Draw, gradient: Tensor, weight: float,
                 into: Tensor | None) -> Tensor:
        """weight dL/ds, (units,) in the logits' type, added to ``into`` where there is one.

        Args:
            gradient: G of the slot's tensor, of any layout.
        """
        from models.mask.fused import kernels

        out = torch.empty_like(logits) if into is None else into
        numbers, sizes = _numbers(slot, draw)
        moving = self.rescaling.gradient is moving_mean
        expected = self.rescaling.gradient is moving_expectation
        gradient, delta = gradient.contiguous(), slot.deltas[0]
        told = {**_kinds(draw), "SCALED": self.scaled, "MOVING": moving, "EXPECTED": expected, "ADD": into is not None,
                "PARTS": _PROGRAMS, "SUB": _SUB}
        if not slot.spec.required_units.single:
            layout, sums = _layout(slot), torch.empty_like(logits, dtype=torch.float32)
            mask = self._unit_mask(slot, logits, draw)
            across = min(_padded(layout[2]), 8 * _SUB)
            together = max(1, 8 * _SUB // across)
            programs, steps = grid(logits.numel(), together)
            with torch.cuda.device_of(logits):
                kernels.gather_units[programs,](gradient, delta, mask, sums, self.parts, logits.numel(), steps, *layout,
                                                UNITS=together, COLUMNS=across)
                kernels.logit_gradient[sizes[0],](
                    sums, sums, logits, out, self.parts, programs, self.scales, slot.logits_index, float(weight),
                    slot.live.numel(), *numbers, *layout, WIDE=True, **told)
            return out
        with torch.cuda.device_of(logits):
            if moving or expected:
                kernels.scale_gradient[sizes[0],](gradient, delta, logits, self.parts, *numbers, **_kinds(draw),
                                                  HARD=draw.hard, SUB=_SUB)
            kernels.logit_gradient[sizes[0],](
                gradient, delta, logits, out, self.parts, sizes[0], self.scales, slot.logits_index, float(weight),
                slot.live.numel(), *numbers, *_layout(slot), WIDE=False, **told)
        return out

    def _unit_mask(self, slot: Slot, logits: Tensor, draw: Draw) -> Tensor:
        """A draw's mask by units, (units,) fp32; parts of the sum that it is divided by are in ``parts``."""
        from models.mask.fused import kernels

        numbers, sizes = _numbers(slot, draw)
        mask = torch.empty_like(logits, dtype=torch.float32)
        with torch.cuda.device_of(logits):
            kernels.measure_units[sizes[0],](
                logits, mask, self.parts, *numbers, *_layout(slot), **_kinds(draw), TRAINED=draw.trained, HARD=draw.hard,
                EXPECTED=self.rescaling.expected, SUB=_SUB)
        return mask


def _numbers(slot: Slot, draw: Draw) -> tuple[tuple[int, int, int, float], tuple[int, int]]:
    """(seed, units, steps, 1 / tau) as every kernel of a draw takes them, and (programs, steps)."""
    units = slot.spec.required_units.size
    sizes = grid(units, 8 * _SUB)
    return (device_seed(f"{draw.key}|{slot.spec.name}"), units, sizes[1], 1 / draw.temperature), sizes


def _layout(slot: Slot) -> tuple[int, int, int]:
    """(columns, units across, columns of a unit) of a slot whose units lie in rows."""
    units = slot.spec.required_units
    return units.matrix[1], units.grid[1], units.columns


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _kinds(draw: Draw) -> dict[str, bool]:
    # the published temperature is a square instead of a power
    return {"MIRRORED": draw.mirrored, "SQUARE": draw.temperature == 0.5}


def adam_serves(parameter: Tensor) -> bool:
    """Whether a step of ``RoundedAdamW`` is one kernel."""
    return parameter.is_cuda and has_triton() and parameter.numel() < _MOST and parameter.is_contiguous()


def adam_step(values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, key: str, step: int,
              group: dict[str, Any]) -> None:
    """``optimiser.adam_block`` of a whole tensor in one kernel, the rounding's noise included.

    Args:
        key: of the noise.
    """
    from models.mask.fused import kernels

    (beta1, beta2), entries = group["betas"], values.numel()
    programs, steps = grid(entries, 4 * _SUB)
    with torch.cuda.device_of(values):
        kernels.adam[programs,](
            values, gradient.contiguous(), mean, square, device_seed(key), entries, steps, beta1, 1 - beta1, beta2,
            1 - beta2, group["eps"], 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), SUB=_SUB)


def device_bits(key: str, count: int, device: torch.device | str) -> Tensor:
    """The kernels' noise of a key, (count,) int16 as ``noise.random_bits`` has it."""
    from models.mask.fused import kernels

    out = torch.empty(count, dtype=torch.int16, device=device)
    programs, steps = grid(count, 8 * _SUB)
    with torch.cuda.device_of(out):
        kernels.noise[programs,](out, device_seed(key), count, steps, SUB=_SUB)
    return out
