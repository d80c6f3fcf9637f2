"""``expert_sum`` on a GPU: when its kernels serve, how they are launched, and their place in autograd.

Of all tokens only gate and up are kept for the backward pass (with the dropout mask, where there is one).
Shapes as in ``expert_sum.py``; k of the E experts are chosen.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.moe.expert_sum import ExpertInputs, SumOptions

#: Name in the kernels -> the function that it is.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu}
#: Numbers that all experts together may have for a token in gate, up or down: more would not fit a program's registers.
WIDEST = 256
#: Programs that keep a large GPU busy.
_PROGRAMS = 512


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name of an activation, told by its values: transformers has several classes for one function."""
    # a module keeps what was found; its class alone says nothing of its arguments
    if (known := getattr(activation, "_kernel_name", "")) != "":
        return known
    points = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        values = activation(points)
    found = next((n for n, function in ACTIVATIONS.items() if torch.allclose(values, function(points), atol=1e-6)), None)
    if isinstance(activation, torch.nn.Module):
        activation._kernel_name = found
    return found


def serves(inputs: ExpertInputs, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a sum goes to the kernels: it lies on a GPU, Triton is there, and they can do it."""
    return inputs.gate.is_cuda and _triton() and fits(inputs, activation)


def fits(inputs: ExpertInputs, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether the kernels can do this sum: a known activation, a type that they compute in, ranks that fit."""
    experts = inputs.down_a.shape[0]
    return (inputs.gate.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and experts * max(inputs.gate_b.shape[2], inputs.down_a.shape[1]) <= WIDEST
            and activation_name(activation) is not None)


def kernel_sum(inputs: ExpertInputs, chosen: Tensor, options: SumOptions) -> tuple[Tensor, Tensor]:
    """As ``expert_sum``, but for ``inputs.weights``, which are (N, k), those of the ``chosen`` (N, k).

    Of B the columns before ``options.frozen``, of A the rows before ``options.frozen_down`` get a gradient of 0.
    """
    return KernelSum.apply(options, chosen, *inputs)


class KernelSum(torch.autograd.Function):
    """The forward kernel, and the two that go backward; call ``kernel_sum``."""

    @staticmethod
    def forward(ctx: Any, options: SumOptions, chosen: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, f) and (N, E, q)."""
        inputs = ExpertInputs(*tensors)
        made = inputs.gate.new_empty(inputs.gate.shape)
        call = Call(inputs, chosen, options)
        small = call.forward(made)
        # the mask too, not in ctx: checkpointing lets go of what is saved, and draws it anew
        ctx.save_for_backward(chosen, options.dropout_mask, *inputs)
        ctx.options = replace(options, dropout_mask=None)
        return made, small.view(len(small), *inputs.down_a.shape[:2])

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor, d_small: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``forward``'s arguments; d_mixed (N, f), d_small (N, E, q)."""
        chosen, mask, *tensors = ctx.saved_tensors
        call = Call(ExpertInputs(*tensors), chosen, replace(ctx.options, dropout_mask=mask))
        d_mixed, d_small = d_mixed.contiguous(), d_small.contiguous()
        d_gate, d_up, d_shrunk, d_weights = call.backward_tokens(d_mixed, d_small)
        # gate_b, up_b, down_a: frozen ones are no reason to read all tokens once more
        factors = call.backward_factors(d_mixed, d_small) if any(ctx.needs_input_grad[-3:]) else (None, None, None)
        return None, None, *ExpertInputs(d_gate, d_up, d_shrunk, d_weights, *factors)


class Call:
    """One sum's sizes and pointers, as the kernels take them.

    Args:
        inputs: as for ``kernel_sum``; gate and up may be views whose rows lie apart, and so may z.
        chosen: (N, k).
    """

    def __init__(self, inputs: ExpertInputs, chosen: Tensor, options: SumOptions,
                 rows: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        from models.moe import kernels

        self.kernels, self.inputs, self.options = kernels, inputs, options
        self.tokens, self.width = inputs.gate.shape
        self.experts, self.rank_down, _ = inputs.down_a.shape
        self.rank = inputs.gate_b.shape[2]
        # (E r, f), (E r, f), (E q, f): rows that lie one after the other are read in whole lines
        self.b_gate, self.b_up, self.a = rows or (inputs.gate_b.mT.flatten(0, 1).contiguous(),
                                                  inputs.up_b.mT.flatten(0, 1).contiguous(),
                                                  inputs.down_a.flatten(0, 1).contiguous())
        z = inputs.shrunk_inputs
        # rows may lie apart, what one row holds may not
        self.z = z if z[0].is_contiguous() else z.contiguous()
        self.weights, self.chosen = inputs.weights.float().contiguous(), chosen.contiguous()
        self.mask = options.dropout_mask
        across, down = self.experts * self.rank, self.experts * self.rank_down
        self.sizes = {
            "SLOTS": chosen.shape[1], "R": self.rank, "ER": across, "Q": self.rank_down, "EQ": down, "EQP": _padded(down),
            "DROPPED": options.dropped_from, "ACT": activation_name(options.activation), "HAS_MASK": self.mask is not None,
            "KC": min(64, _padded(across)), "WIDE": not inputs.gate.is_cuda}

    def _pointers(self) -> tuple[Any, ...]:
        gate, up = self.inputs.gate, self.inputs.up
        # a pointer that nothing is read from stands in for a mask that is not there
        mask = gate if self.mask is None else self.mask.contiguous()
        return (gate, up, gate.stride(0), up.stride(0), self.z, self.z.stride(0), self.weights, self.chosen, self.b_gate,
                self.b_up, self.a, mask)

    def _shape(self, wide: int) -> tuple[dict[str, int], tuple[int, int], int]:
        """Tile, grid and steps of a program whose other dimension is walked: few tokens are shared by many programs."""
        rows = 16 if self.tokens <= 16 or max(wide, self.sizes["EQP"]) > 128 else 32 if max(
            wide, self.sizes["EQP"]) > 64 or self.tokens <= 1024 else 64
        tile = {"BM": rows, "BF": 64 if self.tokens > 16 else 128}
        blocks, tiles = _pieces(self.tokens, rows), _pieces(self.width, tile["BF"])
        steps = _pieces(tiles, max(1, min(tiles, _pieces(_PROGRAMS, blocks))))
        return tile, (blocks, _pieces(tiles, steps)), steps

    def forward(self, mixed: Tensor) -> Tensor:
        """Fill mixed (N, f), a view whose rows may lie apart; returns s, (N, E q), in its dtype."""
        tile, grid, steps = self._shape(0)
        parts = mixed.new_empty(grid[1], self.tokens, self.sizes["EQ"], dtype=torch.float32)
        with torch.cuda.device_of(mixed):
            self.kernels.forward[grid](*self._pointers(), mixed, mixed.stride(0), parts, self.tokens, self.width, steps,
                                       **self.sizes, **tile, num_warps=_warps(tile))
        return parts.sum(0).to(mixed.dtype)

    def backward_tokens(self, d_mixed: Tensor, d_small: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d gate and d up (N, f), dz (N, 2, E, r), dw (N, k)."""
        across = self.sizes["ER"]
        tile, grid, steps = self._shape(_padded(across))
        d_gate, d_up = torch.empty_like(d_mixed), torch.empty_like(d_mixed)
        parts_z = d_mixed.new_empty(grid[1], self.tokens, 2 * across, dtype=torch.float32)
        parts_w = d_mixed.new_empty(grid[1], *self.chosen.shape, dtype=torch.float32)
        with torch.cuda.device_of(d_mixed):
            self.kernels.backward_tokens[grid](
                *self._pointers(), d_mixed, d_small, d_gate, d_up, parts_z, parts_w, self.tokens, self.width, steps,
                SLOTSP=_padded(self.sizes["SLOTS"]), ERP=_padded(across), **self.sizes, **tile, num_warps=_warps(tile))
        d_shrunk = parts_z.sum(0).view(self.inputs.shrunk_inputs.shape).to(self.inputs.shrunk_inputs.dtype)
        return d_gate, d_up, d_shrunk, parts_w.sum(0).to(self.inputs.weights.dtype)

    def backward_factors(self, d_mixed: Tensor, d_small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dB of gate and of up (E, f, r), dA (E, q, f); 0 where frozen."""
        frozen, frozen_down, experts = self.options.frozen, self.options.frozen_down, self.experts
        d_gate_b, d_up_b, d_down_a = (torch.zeros_like(t) for t in self.inputs[-3:])
        across, down = experts * (self.rank - frozen), experts * (self.rank_down - frozen_down)
        if not (across and down):
            return d_gate_b, d_up_b, d_down_a
        tile = {"BM": 32 if self.tokens > 16 else 16, "BF": 64 if max(across, down) <= 64 else 32}
        columns, blocks = _pieces(self.width, tile["BF"]), _pieces(self.tokens, tile["BM"])
        steps = _pieces(blocks, max(1, min(blocks, _pieces(_PROGRAMS, columns))))
        grid = columns, _pieces(blocks, steps)
        parts = [d_mixed.new_empty(grid[1], rows, self.width, dtype=torch.float32) for rows in (across, across, down)]
        with torch.cuda.device_of(d_mixed):
            self.kernels.backward_factors[grid](
                *self._pointers(), d_mixed, d_small, *parts, self.tokens, self.width, steps, FROZEN=frozen, TR=across,
                TRP=_padded(across), FROZEN_A=frozen_down, TQ=down, TQP=_padded(down), **self.sizes, **tile,
                num_warps=_warps(tile))
        gate, up, a = (part.sum(0).view(experts, -1, self.width).to(d_mixed.dtype) for part in parts)
        d_gate_b[:, :, frozen:], d_up_b[:, :, frozen:] = gate.mT, up.mT
        d_down_a[:, frozen_down:] = a
        return d_gate_b, d_up_b, d_down_a


def _padded(size: int) -> int:
    """The next power of two, at least 16: what a tensor core multiplies."""
    return max(16, 1 << (size - 1).bit_length())


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _warps(tile: dict[str, int]) -> int:
    # backward a program holds a dozen such tiles in fp32: with four warps they would not fit its registers
    return 8 if tile["BM"] * tile["BF"] >= 2048 else 4
