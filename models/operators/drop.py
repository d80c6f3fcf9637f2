"""DARE's drop and DELLA's keep probabilities, once: which entries of a task vector stay, and what they are divided by.

``density`` is the share that is kept, 1 - p in the papers. Draws come from outside (``noise``), so that every function here
is pure. A trailing underscore marks what works in place, as in torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kept_below(draws: Tensor, density: float) -> Tensor:
    """Where a draw from U[0, 1) falls below the density: bool, True with probability ``density``. Merges, adapters, PEFT."""
    return draws < density


def kept_above(draws: Tensor, density: float) -> Tensor:
    """The same, told from the drop side (Yu et al. 2024, equation 3: m ~ Bernoulli(p) is dropped): draw >= p = 1 - density.

    A variant of ``kept_below`` of equal distribution and other entries: realignments and masks were published with it.
    """
    return draws >= 1 - density


def drop_(delta: Tensor, kept: Tensor, density: float, rescale: bool = True) -> Tensor:
    """DARE in place: entries not kept become 0, the others are divided by the density (Yu et al. 2024, equation 3).

    Args:
        delta: any shape, overwritten.
        kept: bool, of the same shape: ``kept_below`` or ``kept_above``.
        rescale: keeps the expected value, E[m delta / density] = delta.
    """
    delta.mul_(kept)
    # at density 0 nothing is kept, and 0 / 0 would spread NaN over the merge
    return delta.div_(density) if rescale and density > 0 else delta


def drop(delta: Tensor, kept: Tensor, density: float) -> Tensor:
    """``drop_`` on a copy, rescaled."""
    return drop_(delta.clone(), kept, density)


def keep_probabilities(values: np.ndarray, density: float, epsilon: float) -> Tensor:
    """DELLA's probability for every entry of (rows, columns) fp32, by its rank in the row (Deep et al. 2024, section 3.1).

    From density - epsilon for the smallest magnitude of a row to density + epsilon for the largest; of equal magnitudes the
    lower index ranks higher. A row of one entry, and density 0, have no ramp.
    """
    columns = values.shape[-1]
    if not density or columns < 2:
        return torch.full(values.shape, density)
    # magnitude in the upper half and place in the lower makes one integer to sort, exact in its ties
    keys = (values.view(np.int32) & 0x7FFFFFFF).astype(np.int64)
    keys <<= 32
    # places count down: of equal magnitudes the lowest index must sort last, as the larger
    keys |= np.arange(columns - 1, -1, -1)
    keys.sort(axis=-1)
    places = columns - 1 - torch.from_numpy(keys).bitwise_and_(0xFFFFFFFF)
    ramp = torch.linspace(density - epsilon, density + epsilon, columns)
    rows = places.view(-1, columns)
    return torch.empty(rows.shape).scatter_(1, rows, ramp.expand(rows.shape)).view(values.shape)
