"""The low-rank change that a rounded matrix holds: how far rounding reaches, and what rises above it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.operators.low_rank import Pair, low_rank

#: safetensors type -> bits of the fraction.
_FRACTION = {"F32": 23, "F16": 10, "BF16": 7}
#: The smallest normal number is 2 to this power.
_LOWEST = {"F32": -126, "F16": -14, "BF16": -126}
#: Singular values below this multiple of what rounding alone gives are not told from it.
_ABOVE = 2.0
_FIRST_WIDTH = 16


@dataclass(frozen=True)
class Recovered:
    """A change that was found.

    Args:
        pair: (A (r, in), B (out, r)), fp32.
        left: what base + B A is off the file, by what rounding alone would leave (root mean squares of the matrix).
    """

    pair: Pair
    rank: int
    left: float


def last_place(values: Tensor, dtype: str) -> Tensor:
    """The distance from each fp64 value to its neighbour in a type, fp64."""
    # frexp: values = mantissa 2^exponent with the mantissa in [0.5, 1)
    exponent = (torch.frexp(values).exponent - 1).clamp_min(_LOWEST[dtype])
    exponent = exponent.masked_fill(values == 0, _LOWEST[dtype])
    return torch.ldexp(torch.ones_like(values), exponent - _FRACTION[dtype])


def recover(base: Tensor, stored: Tensor, dtype: str, most: int, seed: int) -> Recovered | None:
    """The change B A with base + B A = stored but for the rounding of ``stored``; None where its rank is above ``most``.

    A rounded value is off by at most half a unit of the last place, uniformly: a matrix of such errors of standard
    deviation s has singular values up to about s (sqrt(rows) + sqrt(columns)). What is larger was in the change.

    Args:
        base, stored: (out, in), in the types of their files.
        dtype: of ``stored``, as safetensors calls it.
        seed: of the SVD's sampling.
    """
    # fp64: singular values of an fp32 matrix drown in fp32 arithmetic before they drown in its rounding
    change = stored.double() - base.double()
    if not change.any():
        zero = torch.zeros(1, change.shape[1]), torch.zeros(change.shape[0], 1)
        return Recovered(zero, 1, 0.0)
    place = last_place(stored.double(), dtype)
    error = float(place.square().mean() / 12) ** 0.5
    floor = _ABOVE * error * (change.shape[0] ** 0.5 + change.shape[1] ** 0.5)
    width = min(_FIRST_WIDTH, most + 1)
    while True:
        a, b = low_rank(change, width, seed=seed).pair
        # split evenly: the rows of A have the norms sqrt(s)
        rank = int((a.square().sum(1) > floor).sum())
        # the whole width above the floor: there may be more behind it
        if rank < width or width >= min(change.shape):
            break
        if width > most:
            return None
        width = min(2 * width, most + 1)
    if rank > most:
        return None
    rank = max(rank, 1)
    pair = a[:rank].float(), b[:, :rank].float()
    again = base.double() + pair[1].double() @ pair[0].double()
    # not value by value: beside a value near 0 any error is many units of its last place
    left = float((again - stored.double()).square().mean()) ** 0.5 / error
    return Recovered(pair, rank, left)
