"""What a mask is divided by, and what that does to its logits' gradient: one row per ``--rescale``.

Written theta = theta_s + a m D with the scale a = 1 / mu, the loss reaches a logit by two ways, the mask and the mean:

    dL/ds_j = a c_j m'_j - a^2 T dmu/ds_j

    c_j = dL/d(a m_j), the sum of G D over the logit's unit      mask gradient
    m'_j = m_j (1 - m_j) / tau                                   slope of the soft draw (Maddison et al. 2017)
    T = dL/da = sum_k c_k m_k                                    scale gradient

and the rows differ in mu alone (spec sections 4.2 and 4.5; n entries, n_j of them in unit j):

    none      mu = 1                    dmu/ds_j = 0
    tensor    mu = mean(m)              dmu/ds_j = n_j m'_j / n
    detached  mu = mean(m)              taken as 0, though it is not
    global    mu = mean over all m      as for ``tensor``, n and T over all tensors
    expected  mu = mean(sigmoid(s))     dmu/ds_j = n_j sigmoid(s_j) (1 - sigmoid(s_j)) / n
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """A tensor's scale and its gradient.

    Args:
        value: a = 1 / mu.
        gradient: T = dL/da; of this tensor.
        entries: n.
    """

    value: float
    gradient: float
    entries: float

    @property
    def share(self) -> float:
        """a T / n: what one entry's mean takes back of c_j."""
        return self.value * self.gradient / self.entries


@dataclass(frozen=True)
class LogitBlock:
    """What the gradient of a block of logits is made of; each tensor (block,), except where it says otherwise.

    Args:
        mask_gradient: c_j; the result takes its memory.
        scaled_slope: a m'_j.
        logits: s_j, in the type that they train in.
        entries: n_j; 1.0: one each.
    """

    mask_gradient: Tensor
    scaled_slope: Tensor
    logits: Tensor
    entries: Tensor | float


def fixed_mean(block: LogitBlock, scale: Scale) -> Tensor:
    """a c_j m'_j: the mean does not move, or its part comes later (``joint_mean_part``)."""
    return block.mask_gradient.mul_(block.scaled_slope)


def moving_mean(block: LogitBlock, scale: Scale) -> Tensor:
    """a (c_j - n_j a T / n) m'_j: both ways share the slope, so that one subtraction does for the mean."""
    return block.mask_gradient.sub_(scale.share * block.entries).mul_(block.scaled_slope)


def moving_expectation(block: LogitBlock, scale: Scale) -> Tensor:
    """a c_j m'_j - a^2 T n_j p_j (1 - p_j) / n with p = sigmoid(s): the mean has a slope of its own."""
    keep = torch.sigmoid(block.logits.to(block.mask_gradient.dtype))
    mean_part = (1 - keep).mul_(keep).mul_(scale.share * scale.value).mul_(block.entries)
    return block.mask_gradient.mul_(block.scaled_slope).sub_(mean_part)


def joint_mean_part(slope: Tensor, scale: Scale, entries: Tensor | float) -> Tensor:
    """a^2 T n_j m'_j / n, in the memory of m'_j (units,): what ``global`` subtracts when T and n of all are known."""
    return slope.mul_(scale.value * scale.value * scale.gradient / scale.entries).mul_(entries)


def drawn(mask: Tensor, logits: Tensor) -> Tensor:
    """m itself."""
    return mask


def expectation(mask: Tensor, logits: Tensor) -> Tensor:
    """sigmoid(s), (units,) in the mask's type."""
    return torch.sigmoid(logits.to(mask.dtype))


@dataclass(frozen=True)
class Rescaling:
    """A row.

    Args:
        measured: (mask, logits) -> what mu is the mean of; None: mu = 1.
        gradient: from a block's mask gradient to that of its logits.
        joint: one mu over all tensors instead of one each.
    """

    measured: Callable[[Tensor, Tensor], Tensor] | None
    gradient: Callable[[LogitBlock, Scale], Tensor]
    joint: bool = False

    @property
    def expected(self) -> bool:
        """Whether the logits alone determine mu, whatever is drawn."""
        return self.measured is expectation

    @property
    def undoes_one_unit(self) -> bool:
        """Whether the mask of a tensor with a single logit becomes m / m = 1."""
        return self.measured is drawn and not self.joint


RESCALINGS = {
    "none": Rescaling(None, fixed_mean),
    "tensor": Rescaling(drawn, moving_mean),
    "detached": Rescaling(drawn, fixed_mean),
    "global": Rescaling(drawn, fixed_mean, joint=True),
    "expected": Rescaling(expectation, moving_expectation),
}
RESCALES = tuple(RESCALINGS)
