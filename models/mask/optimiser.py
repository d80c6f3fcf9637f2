"""AdamW for logits in bfloat16: each step computed in fp32 and rounded to chance, so that none of them is lost.

A bfloat16 has 8 bits: next to 1 the numbers lie 0.0078 apart, and a step of less than half of that, rounded to the nearest,
is no step at all. Adam's steps are about the learning rate (5e-3 at most as published, and less as it decays), so that
plain AdamW in bfloat16 leaves logits standing where they have grown; and a second moment that should decay by a thousandth
a step stays where it is. Rounded up or down with probabilities that make the mean right (stochastic rounding; Gupta et al.
2015, section 3), steps and moments arrive in expectation, whatever their size.

The noise is counted (``models/operators/noise.py``): a function of seed, step, parameter and index alone, so that a resumed
run goes on with the same numbers. 8 bytes a logit: itself, its gradient and two moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from models.base.parted import first_row, own_part
from models.mask.blocks import length, piece
from models.mask.fused.launch import adam_serves, adam_step
from models.operators.noise import random_bits
from models.operators.spans import BLOCK

#: Entries of a step on a GPU, where each operation is a kernel: what is fp32 in between stays below half a GB.
_GPU_BLOCK = 1 << 24


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bfloat16, up or down at random so that the mean over ``bits`` is right; what fits stays, inf and NaN too.

    Args:
        values: (n,) fp32, overwritten.
        bits: (n,) int16, ``random_bits``.
    """
    # the 16 bits that bfloat16 lacks: adding 0 to 65535 to the pattern carries into the kept half in proportion to them
    pattern = values.view(torch.int32)
    carried = pattern + bits.to(torch.int32).bitwise_and_(0xFFFF)
    # an exponent of all ones is no number to round: a carry would turn a NaN into something else
    finite = torch.isfinite(values)
    return torch.where(finite, carried.bitwise_and_(-65536), pattern).view(torch.float32).to(torch.bfloat16)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on bfloat16 parameters, rounded stochastically.

    Args:
        params: of bfloat16; their moments are, too.
        seed: of the rounding.

    Raises:
        ValueError: parameters of another type, which need none of this.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        if odd := {str(p.dtype) for group in self.param_groups for p in group["params"]} - {"torch.bfloat16"}:
            raise ValueError(f"parameters of {', '.join(sorted(odd))}: only bfloat16 is rounded here")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not called here")
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, number)
                number += 1

    def _step(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        # where it counts is on the CPU, as torch's own AdamW has it: no wait for a device
        state = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")} | {"step": torch.zeros(())}
        state["step"] += 1
        step = int(state["step"])
        values, gradient, mean, square = map(own_part, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        # of a parameter that FSDP2 parts the rows of each process have a stream of their own
        key = f"{group['seed']}|adam|{step}|{number}" + (f"|row {row}" if (row := first_row(parameter)) else "")
        if adam_serves(values):
            adam_step(values, gradient, mean, square, key, step, group)
            return
        for part, block in enumerate(_blocks(values)):
            # a device's stream starts at 0 only, so every block has a key of its own
            noise, moment_noise = (random_bits(f"{key}|{part}|{name}", 0, length(block), values.device)
                                   for name in ("logits", "moments"))
            adam_block(piece(gradient, block), piece(values, block), piece(mean, block), piece(square, block), noise,
                       moment_noise, step, group)


def adam_block(gradient: Tensor, values: Tensor, mean: Tensor, square: Tensor, noise: Tensor, moment_noise: Tensor,
               step: int, group: dict[str, Any]) -> None:
    """AdamW's step of a block, in place; all tensors (block,), bfloat16 but for the int16 noise.

    Args:
        mean, square: exp_avg and exp_avg_sq.
        step: from 1.
        group: lr, betas, eps, weight_decay.
    """
    (beta1, beta2), g = group["betas"], gradient.float()
    new_mean = mean.float().lerp_(g, 1 - beta1)
    new_square = square.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # from the moments as computed, before they are rounded
    denominator = new_square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    moved = values.float().mul_(1 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(new_mean, denominator, value=-group["lr"] / (1 - beta1**step))
    values.copy_(round_stochastically(moved, noise))
    # one noise for both moments: their roundings go together, and each of them is right in the mean
    mean.copy_(round_stochastically(new_mean, moment_noise))
    square.copy_(round_stochastically(new_square, moment_noise))


def _blocks(tensor: Tensor) -> Iterable[slice]:
    step = BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK
    for first in range(0, tensor.numel(), step):
        yield slice(first, min(first + step, tensor.numel()))
