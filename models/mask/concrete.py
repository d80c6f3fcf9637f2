"""The binary Concrete mask of SOMF: draws from counted noise, rescaling, and the logits' gradient in closed form.

For a tensor with n entries, mask m, mean mu and merged weights theta = theta_s + (m / mu) D, the gradient is

    dL/ds_j = (1 / mu) [G_j D_j - (1 / (n mu)) sum_k G_k D_k m_k] m_j (1 - m_j) / tau,    G = dL/dtheta

so training needs the weights' ordinary gradient G and no graph through the mask. A logit may stand for a group of entries
("unit"): G D is then summed over the group, and the mean weighs each unit by its size.

Noise is a function of (key, index) alone, Philox by counter, and is drawn again in the backward pass instead of stored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.operators.noise import midpoints, random_bits

#: 16 random bits per logit, and the numbers in (0, 1) that they stand for.
noise, uniform = random_bits, midpoints
#: Entries that are summed in the mask's own type before sums are added in fp64.
_PART = 1 << 20
RESCALES = ("none", "tensor", "detached", "global", "expected")


def soft_mask(logits: Tensor, bits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """m = sigmoid((s + log u - log(1 - u)) / tau), one binary Concrete draw per logit (Maddison et al. 2017, section 3.3).

    Computed as 1 / (1 + ((1 - u) / (u e^s))^(1 / tau)): one exponential and no logarithm, in as few passes as there can be.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    odds = torch.empty(logits.shape, dtype=kind, device=logits.device) if out is None else out
    odds.copy_(bits)
    below = (odds + 32768.5).mul_(torch.exp(logits.to(kind)))
    odds.sub_(32767.5).div_(below)  # negative until here
    if temperature == 0.5:
        odds.mul_(odds)
    else:
        odds.neg_().pow_(1 / temperature)
    return odds.add_(1).reciprocal_()


def hard_mask(logits: Tensor, bits: Tensor) -> Tensor:
    """A Bernoulli(sigmoid(s)) draw, zeros and ones: where the soft draw of the same bits exceeds 1/2."""
    return soft_mask(logits, bits, 1.0).gt_(0.5)


def slope(soft: Tensor, temperature: float, scale: float = 1.0) -> Tensor:
    """scale dm/ds = scale m (1 - m) / tau of a soft draw."""
    return torch.addcmul(soft, soft, soft, value=-1).mul_(scale / temperature)


def scale_for(mean: float) -> float:
    """1 / mean, and 1 for a mask that is zero throughout: its product stays 0 instead of becoming 0/0."""
    return 1 / mean if mean > 0 else 1.0


def mean_of(mask: Tensor, counts: Tensor | None) -> float:
    """The mask's mean over entries; ``counts`` entries per unit, None: one each."""
    if not mask.numel():
        return 1.0
    if counts is None:
        # by parts: torch would widen the whole tensor first
        return float(torch.stack([part.sum() for part in mask.split(_PART)]).double().sum()) / mask.numel()
    return float((mask.double() * counts).sum() / counts.sum())


def logit_gradient(inner: Tensor, mask: Tensor, rise: Tensor, scale: float, rescale: str, counts: Tensor | None = None,
                   keep: Tensor | None = None, total: float | None = None, size: int | None = None) -> Tensor:
    """dL/ds of one tensor's units, in place of ``inner``.

    Args:
        inner: sum over the unit of G D.
        mask: the units' values in the forward pass (hard ones, when trained straight through).
        rise: derivative of the rescaled mask by the logit (of the soft draw), the mean held fixed.
        scale: what the mask was multiplied by, 1 / mean.
        rescale: one of RESCALES.
        counts: entries per unit; None: one each.
        keep: sigmoid(s), for ``expected``.
        total, size: for ``global``: sum of G D m, and entries, over all tensors; for others those of this one.
    """
    if rescale in ("none", "detached"):
        return inner.mul_(rise)
    if total is None:
        total = float((inner * mask).sum(dtype=torch.float64))
    if size is None:
        size = inner.numel() if counts is None else int(counts.sum())
    share = scale * total / size
    sizes = 1.0 if counts is None else counts.to(inner.dtype)
    if rescale == "expected":
        drift = (1 - keep).mul_(keep).mul_(share * scale).mul_(sizes)
        return inner.mul_(rise).sub_(drift)
    return inner.sub_(share * sizes).mul_(rise)


def prior_gradient(logits: Tensor, prior: float) -> Tensor:
    """d/ds of KL(Bernoulli(sigmoid(s)) || Bernoulli(prior)): (s - logit(prior)) p (1 - p)."""
    keep = torch.sigmoid(logits.float())
    target = float(np.log(prior / (1 - prior)))
    return (logits.float() - target).mul_(keep).mul_(1 - keep)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of Bernoulli(sigmoid(s)) in bits, per logit."""
    p = torch.sigmoid(logits.double())
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / float(np.log(2))
