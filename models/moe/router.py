"""The router: its start values, the gating loss, the drift of experts, routing statistics.

Everything here is a function on tensors; which tensors to pass is the trainer's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.operators.low_rank import differentiable_norm

#: Added under the square root of a norm: at zero drift the gradient must be 0, not 0/0.
_TINY = 1e-20


def random_router(num_experts: int, hidden: int, std: float, generator: torch.Generator) -> Tensor:
    """A seeded N(0, std) router, shape (experts, hidden), fp32 (H3Fusion, section 4.3 of the spec)."""
    return torch.randn(num_experts, hidden, generator=generator) * std


def discriminant_router(means: Tensor, covariance: Tensor, sharpness: float, shrinkage: float = 0.1) -> Tensor:
    """A router from data: linear discriminant directions between the objectives' mean FFN inputs.

    Args:
        means: (experts, hidden), mean FFN input of each objective's tokens.
        covariance: (hidden, hidden), covariance within the objectives.
        sharpness: standard deviation that the logits shall have over tokens; sets how decided the start is.
        shrinkage: share of the covariance's mean variance that is added to its diagonal.

    Returns:
        (experts, hidden): rows S^-1 (mean_e - grand mean), scaled. Without a bias the grand mean itself must score
        equally for every expert, so that direction is removed from the rows.
    """
    means, covariance = means.double(), covariance.double()
    grand = means.mean(0)
    ridge = shrinkage * covariance.diagonal().mean()
    regular = covariance + ridge * torch.eye(len(covariance), dtype=torch.double)
    rows = torch.linalg.solve(regular, (means - grand).T).T
    rows = rows - (rows @ grand)[:, None] * grand / grand.square().sum().clamp_min(1e-12)
    spread = torch.einsum("ed,df,ef->e", rows, covariance, rows).mean() + (rows @ (means - grand).T).var()
    return (rows * sharpness / spread.sqrt().clamp_min(1e-12)).float()


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, keep the top k, renormalise (spec section 4.4).

    Args:
        logits: (tokens, experts).

    Returns:
        probabilities (tokens, experts) fp32, before top-k; weights (tokens, k), summing to 1; indices (tokens, k).
    """
    probabilities = logits.float().softmax(-1)
    weights, chosen = probabilities.topk(top_k, dim=-1)
    return probabilities, weights / weights.sum(-1, keepdim=True), chosen


def mean_probabilities(probabilities: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean router probability of each sample in each layer, over the masked-in tokens.

    Args:
        probabilities: per layer (batch, time, experts).
        mask: (batch, time), 1 for tokens that count.

    Returns:
        (layers, batch, experts). A sample without a token that counts gets NaN-free zeros: mask it out.
    """
    weight = mask.to(probabilities[0].dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    return torch.stack([torch.einsum("bte,bt->be", p, weight) for p in probabilities])


def gate_loss(means: Tensor, objectives: Tensor, *, per_layer: bool = False, published: bool = False) -> Tensor:
    """Gating loss of each sample (spec section 5.2).

    Args:
        means: (layers, batch, experts) from ``mean_probabilities``.
        objectives: (batch,) index of the right expert.
        per_layer: a loss per layer, averaged, instead of one loss on the layer mean.
        published: the original's second softmax (cross-entropy fed with probabilities).

    Returns:
        (batch,): negative log of the right expert's mean probability.
    """
    if not per_layer:
        means = means.mean(0, keepdim=True)
    log_p = F.log_softmax(means, -1) if published else means.clamp_min(1e-12).log()
    index = objectives.view(1, -1, 1).expand(len(means), -1, 1)
    return -log_p.gather(-1, index).squeeze(-1).mean(0)


def low_rank_norm(a: Tensor, b: Tensor) -> Tensor:
    """||B A||_F without forming B A: sqrt(trace((B^T B)(A A^T))), r x r matrices only (spec section 5.4).

    Args:
        a: (..., r, in).
        b: (..., out, r).

    Returns:
        (...): the norm; its gradient at zero is zero.
    """
    return differentiable_norm(a, b)


def drift(norms: Tensor, base_norms: Tensor, mode: str) -> Tensor:
    """Drift of one expert: mean over layers and projections of ||change||_F, squared, or relative to the base.

    Args:
        norms: (matrices,) Frobenius norms of the expert's change from its aligned weights.
        base_norms: (matrices,) norms of the aligned weights.
    """
    if mode == "squared":
        return norms.square().mean()
    if mode == "relative":
        return (norms / base_norms).mean()
    return norms.mean()


def published_weight_norm(groups: Sequence[Sequence[Tensor]], constants: Sequence[float], num_layers: int) -> Tensor:
    """The original's regulariser: sum of ||w||_F over all tensors of the expert, frozen base included, over the layers.

    Args:
        groups: trainable tensors, one inner sequence per layer.
        constants: norms of the frozen base matrices; they add to the value and have no gradient.
    """
    total = sum((w.float().square().sum() + _TINY).sqrt() for group in groups for w in group)
    return (total + sum(constants)) / num_layers
