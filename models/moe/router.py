"""The router: its start values, the gating loss, the drift of experts, routing statistics.

Everything here is a function on tensors; which tensors to pass is the trainer's business.

Shapes: L layers, B samples, T tokens of a sample, N tokens in all, E experts, d hidden size.
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
    """A seeded N(0, std) router, (E, d), fp32 (H3Fusion, section 4.3 of the spec)."""
    return torch.randn(num_experts, hidden, generator=generator) * std


def discriminant_router(means: Tensor, covariance: Tensor, sharpness: float, shrinkage: float = 0.1) -> Tensor:
    """A router from data: linear discriminant directions between the objectives' mean FFN inputs.

    Args:
        means: (E, d), mean FFN input of each objective's tokens.
        covariance: (d, d), covariance within the objectives.
        sharpness: standard deviation that the logits shall have over tokens; sets how decided the start is.
        shrinkage: share of the covariance's mean variance that is added to its diagonal.

    Returns:
        (E, d) fp32: rows S^-1 (mean_e - grand mean), Fisher's directions (1936), scaled. Without a bias the grand mean
        itself must score equally for every expert, so that direction is removed from the rows.
    """
    # fp64: a few thousand tokens make a badly conditioned covariance of d dimensions
    means, covariance = means.double(), covariance.double()
    grand_mean = means.mean(0)
    centred = means - grand_mean
    ridge = shrinkage * covariance.diagonal().mean()
    regular = covariance + ridge * torch.eye(len(covariance), dtype=torch.double)
    rows = torch.linalg.solve(regular, centred.T).T
    rows = rows - (rows @ grand_mean)[:, None] * grand_mean / grand_mean.square().sum().clamp_min(1e-12)
    # variance of a logit over tokens: within an objective, plus between the objectives' means
    variance = torch.einsum("ed,df,ef->e", rows, covariance, rows).mean() + (rows @ centred.T).var()
    return (rows * sharpness / variance.sqrt().clamp_min(1e-12)).float()


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, keep the top k, renormalise (spec section 4.4).

    Args:
        logits: (N, E).

    Returns:
        probabilities (N, E) fp32, before top-k; weights (N, k), summing to 1; indices (N, k).
    """
    probabilities = logits.float().softmax(-1)
    weights, chosen = probabilities.topk(top_k, dim=-1)
    return probabilities, weights / weights.sum(-1, keepdim=True), chosen


def mean_probabilities(probabilities: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean router probability of each sample in each layer, over the masked-in tokens.

    Args:
        probabilities: per layer (B, T, E).
        mask: (B, T), 1 for tokens that count.

    Returns:
        (L, B, E). A sample without a token that counts gets NaN-free zeros: mask it out.
    """
    token_weights = mask.to(probabilities[0].dtype)
    token_weights = token_weights / token_weights.sum(-1, keepdim=True).clamp_min(1)  # (B, T)
    # layer by layer: stacked first, all (L, B, T, E) would be there twice
    return torch.stack([torch.einsum("bte,bt->be", layer, token_weights) for layer in probabilities])


def gate_loss(means: Tensor, objectives: Tensor, *, per_layer: bool = False, published: bool = False) -> Tensor:
    """Gating loss of each sample (spec section 5.2).

    Args:
        means: (L, B, E) from ``mean_probabilities``.
        objectives: (B,) index of the right expert.
        per_layer: a loss per layer, averaged, instead of one loss on the layer mean.
        published: the original's second softmax (cross-entropy fed with probabilities).

    Returns:
        (B,): negative log of the right expert's mean probability.
    """
    if not per_layer:
        means = means.mean(0, keepdim=True)
    # the floor keeps the log finite for a sample without tokens, and for an expert that a layer has shut out
    log_probabilities = F.log_softmax(means, -1) if published else means.clamp_min(1e-12).log()
    right_expert = objectives.view(1, -1, 1).expand(len(means), -1, 1)
    return -log_probabilities.gather(-1, right_expert).squeeze(-1).mean(0)


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
        mode: "norm", "squared" or "relative", as in --drift_mode.

    Returns:
        (): in the norms' type.
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

    Returns:
        (): fp32.
    """
    total = sum((weight.float().square().sum() + _TINY).sqrt() for group in groups for weight in group)
    return (total + sum(constants)) / num_layers
