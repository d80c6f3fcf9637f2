"""The binary Concrete mask of SOMF: draws from counted noise, rescaling, and the logits' gradient in closed form.

For a tensor with n entries, mask m, mean mu and merged weights theta = theta_s + (m / mu) D, the gradient is

    dL/ds_j = (1 / mu) [G_j D_j - (1 / (n mu)) sum_k G_k D_k m_k] m_j (1 - m_j) / tau,    G = dL/dtheta

so training needs the weights' ordinary gradient G and no graph through the mask. A logit may stand for a group of entries
("unit"): G D is then summed over the group, and the mean weighs each unit by its size. What else a mask may be divided by,
and the gradient of each, is in ``models/mask/rescale.py``.

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
_SUMMED_AT_ONCE = 1 << 20


def soft_mask(logits: Tensor, bits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """m = sigmoid((s + log u - log(1 - u)) / tau), one binary Concrete draw per logit (Maddison et al. 2017, section 3.3).

    Computed as 1 / (1 + ((1 - u) / (u e^s))^(1 / tau)): one exponential and no logarithm, in as few passes as there can be.

    Args:
        logits, bits: s and the noise of u, (units,) each.
        out: fp32 or wider, (units,): where the mask shall be, and the only memory of that size beside a temporary.
    """
    # bfloat16 has 8 bits of mantissa, u has 16
    dtype = torch.promote_types(logits.dtype, torch.float32)
    odds = torch.empty(logits.shape, dtype=dtype, device=logits.device) if out is None else out
    odds.copy_(bits)
    # 65536 u e^s and -65536 (1 - u): the 65536 falls out of their ratio
    kept_weight = (odds + 32768.5).mul_(torch.exp(logits.to(dtype)))
    odds.sub_(32767.5).div_(kept_weight)  # minus the odds of dropping
    if temperature == 0.5:
        odds.mul_(odds)  # the published temperature: a square, which takes the sign along, instead of a power
    else:
        odds.neg_().pow_(1 / temperature)
    return odds.add_(1).reciprocal_()


def hard_mask(logits: Tensor, bits: Tensor) -> Tensor:
    """A Bernoulli(sigmoid(s)) draw, zeros and ones: where the soft draw of the same bits exceeds 1/2."""
    return soft_mask(logits, bits, 1.0).gt_(0.5)


def soft_slope(soft: Tensor, temperature: float, scale: float = 1.0) -> Tensor:
    """scale dm/ds = scale m (1 - m) / tau of a soft draw, (units,); the draw itself stays."""
    return torch.addcmul(soft, soft, soft, value=-1).mul_(scale / temperature)


def scale_for(mean: float) -> float:
    """1 / mean, and 1 for a mask that is zero throughout: its product stays 0 instead of becoming 0/0."""
    return 1 / mean if mean > 0 else 1.0


def mean_of(mask: Tensor, counts: Tensor | None) -> float:
    """The mask's mean over entries; ``counts`` entries per unit, (units,), None: one each. 1.0 for a mask of nothing."""
    if not mask.numel():
        return 1.0
    return sum_of(mask, counts) / (mask.numel() if counts is None else float(counts.sum()))


def sum_of(mask: Tensor, counts: Tensor | None) -> float:
    """The mask's sum over entries; arguments as in ``mean_of``."""
    if counts is not None:
        return float((mask.double() * counts).sum())
    # sum(dtype=float64) would widen the whole tensor first; sums of a million fp32 numbers from 0 to 1 are exact enough
    return float(torch.stack([some.sum() for some in mask.split(_SUMMED_AT_ONCE)]).double().sum())


def prior_gradient(logits: Tensor, prior: float) -> Tensor:
    """d/ds of KL(Bernoulli(p) || Bernoulli(prior)) with p = sigmoid(s): (s - logit(prior)) p (1 - p), (units,) fp32."""
    keep = torch.sigmoid(logits.float())
    prior_logit = float(np.log(prior / (1 - prior)))
    return (logits.float() - prior_logit).mul_(keep).mul_(1 - keep)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of Bernoulli(sigmoid(s)) in bits, per logit, fp64."""
    keep = torch.sigmoid(logits.double())
    # xlogy: 0 log 0 is 0, for logits so large that nothing is left to chance
    return -(torch.special.xlogy(keep, keep) + torch.special.xlogy(1 - keep, 1 - keep)) / float(np.log(2))
