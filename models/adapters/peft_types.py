"""PEFT's combination types as PEFT 0.21 defines them, for people who must compare: --compat peft.

They add up the factors A_i and B_i, not the changes: the result holds cross terms B_i A_j, and depends on how a change is
split into factors (``linear`` of two independent adapters is 0.9 off in relative norm). Differences to PEFT itself: random
masks come from our counter instead of torch's global generator, and scale flags of rsLoRA sources are not copied into the
result (there they make it sqrt(r) too large). Factors come without their scale s_i; the weights here are c_i = w_i s_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.adapters import methods as methods
from models.adapters.merges import Draw
from models.operators.core_space import cut, project
from models.operators.low_rank import Pair, low_rank

#: Sparsifies the stacked tensors (n, ..) of one factor, and merges them with weights (n, 1, 1).
Rule = Callable[[Tensor, Tensor], Tensor]


def concatenate(pairs: Sequence[Pair], weights: Sequence[float], p: methods.Cat, draw: Draw) -> Pair:
    """A = rows c_i A_i, B = columns B_i; exact."""
    return torch.cat([c * a for (a, _), c in zip(pairs, weights, strict=True)]), torch.cat([b for _, b in pairs], 1)


def svd(pairs: Sequence[Pair], weights: Sequence[float], p: methods.Rank, draw: Draw) -> Pair:
    """The SVD of sum_i c_i B_i A_i cut to a rank (default: the largest of the inputs), singular values all in B."""
    core = project(pairs, "core")
    merged = sum(c * task for task, c in zip(core.tasks, weights, strict=True))
    return _values_in_b(cut(core, merged, p.rank or max(a.shape[0] for a, _ in pairs)).pair)


def linear(pairs: Sequence[Pair], weights: Sequence[float], p: methods.Cat, draw: Draw) -> Pair:
    """A = sum_i sgn(c_i) sqrt|c_i| A_i, B = sum_i sqrt|c_i| B_i."""
    return _on_factors(pairs, weights, _sum)


def ties(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftTies, draw: Draw) -> Pair:
    """Trim each factor, elect signs by the unweighted sum (0: positive), average the weighted entries that agree."""
    return _on_factors(pairs, weights, lambda parts, w: _disjoint(_top(parts, p.density), w, p.majority_sign_method))


def dare_linear(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDensity, draw: Draw) -> Pair:
    """Drop entries of each factor, divide the rest by the density, then as ``linear``."""
    dropped = _dropper(p.density, draw)
    return _on_factors(pairs, weights, lambda parts, w: _sum(dropped(parts), w))


def dare_ties(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftTies, draw: Draw) -> Pair:
    """Drop entries of each factor, divide the rest by the density, then elect as ``ties``."""
    dropped = _dropper(p.density, draw)
    return _on_factors(pairs, weights, lambda parts, w: _disjoint(dropped(parts), w, p.majority_sign_method))


def magnitude_prune(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDensity, draw: Draw) -> Pair:
    """Trim each factor, then as ``linear``."""
    return _on_factors(pairs, weights, lambda parts, w: _sum(_top(parts, p.density), w))


def ties_svd(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDenseTies, draw: Draw) -> Pair:
    """``ties`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, p, lambda parts, w: _disjoint(_top(parts, p.density), w, p.majority_sign_method))


def dare_linear_svd(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDense, draw: Draw) -> Pair:
    """``dare_linear`` on the dense changes, then SVD."""
    dropped = _dropper(p.density, draw)
    return _on_dense(pairs, weights, p, lambda parts, w: _sum(dropped(parts), w))


def dare_ties_svd(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDenseTies, draw: Draw) -> Pair:
    """``dare_ties`` on the dense changes, then SVD."""
    dropped = _dropper(p.density, draw)
    return _on_dense(pairs, weights, p, lambda parts, w: _disjoint(dropped(parts), w, p.majority_sign_method))


def magnitude_prune_svd(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDense, draw: Draw) -> Pair:
    """``magnitude_prune`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, p, lambda parts, w: _sum(_top(parts, p.density), w))


def _on_factors(pairs: Sequence[Pair], weights: Sequence[float], rule: Rule) -> Pair:
    roots = [math.sqrt(abs(c)) for c in weights]
    signed = [math.copysign(root, c) if c else 0.0 for root, c in zip(roots, weights, strict=True)]
    a, b = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    return rule(a, _column(signed)), rule(b, _column(roots))


def _on_dense(pairs: Sequence[Pair], weights: Sequence[float], p: methods.PeftDense, rule: Rule) -> Pair:
    merged = rule(torch.stack([b @ a for a, b in pairs]), _column(weights))
    return _values_in_b(low_rank(merged, p.rank or max(a.shape[0] for a, _ in pairs)).pair)


def _column(weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights).view(-1, 1, 1)


def _values_in_b(pair: Pair) -> Pair:
    """B = U S and A = V^T of evenly split factors."""
    a, b = pair
    roots = a.norm(dim=1)
    return a / roots.clamp_min(1e-30)[:, None], b * roots


def _sum(parts: Tensor, weights: Tensor) -> Tensor:
    return (parts * weights).sum(0)


def _top(parts: Tensor, density: float) -> Tensor:
    """The int(density x size) entries of largest magnitude of each."""
    if density >= 1:
        return parts
    flat = parts.flatten(1)
    places = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, places, flat.gather(1, places)).view_as(parts)


def _dropper(density: float, draw: Draw) -> Callable[[Tensor], Tensor]:
    """DARE with fresh draws for each of a module's two factors."""
    used = 0

    def dropped(parts: Tensor) -> Tensor:
        nonlocal used
        if density >= 1:
            return parts
        first = used
        used += len(parts)
        masks = torch.stack([draw(first + i, tuple(part.shape)) < density for i, part in enumerate(parts)])
        return parts * masks / density

    return dropped


def _disjoint(parts: Tensor, weights: Tensor, method: str) -> Tensor:
    elected = parts.sum(0) if method == "total" else parts.sign().sum(0)
    agree = parts.sign() == torch.where(elected >= 0, 1, -1)
    return (parts * weights * agree).sum(0) / agree.sum(0).clamp(min=1)
