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
from models.operators.drop import drop, kept_below
from models.operators.election import elect_as_peft
from models.operators.low_rank import Pair, low_rank, product
from models.operators.selection import trim_as_peft

#: Sparsifies the stacked tensors (n, ..) of one factor; the number is that of its first draw.
Sparsify = Callable[[Tensor, int], Tensor]
#: Merges them with weights (n, 1, 1) -> (..).
Merge = Callable[[Tensor, Tensor], Tensor]


def concatenate(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Cat, draw: Draw) -> Pair:
    """A = rows c_i A_i, B = columns B_i; exact."""
    return torch.cat([c * a for (a, _), c in zip(pairs, weights, strict=True)]), torch.cat([b for _, b in pairs], 1)


def svd(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Rank, draw: Draw) -> Pair:
    """The SVD of sum_i c_i B_i A_i cut to a rank (default: the largest of the inputs), singular values all in B."""
    # PEFT forms the dense sum and takes its SVD; of the core it is the same, to rounding
    core = project(pairs, "core")
    merged = sum(c * task for task, c in zip(core.tasks, weights, strict=True))
    return _values_in_b(cut(core, merged, parameters.rank or max(a.shape[0] for a, _ in pairs)).pair)


def linear(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Cat, draw: Draw) -> Pair:
    """A = sum_i sgn(c_i) sqrt|c_i| A_i, B = sum_i sqrt|c_i| B_i."""
    return _on_factors(pairs, weights, _everything, _add_up)


def ties(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftTies, draw: Draw) -> Pair:
    """Trim each factor, elect signs by the unweighted sum (0: positive), average the weighted entries that agree."""
    return _on_factors(pairs, weights, _trimmed(parameters), _elected(parameters))


def dare_linear(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDensity, draw: Draw) -> Pair:
    """Drop entries of each factor, divide the rest by the density, then as ``linear``."""
    return _on_factors(pairs, weights, _dropped(parameters, draw), _add_up)


def dare_ties(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftTies, draw: Draw) -> Pair:
    """Drop entries of each factor, divide the rest by the density, then elect as ``ties``."""
    return _on_factors(pairs, weights, _dropped(parameters, draw), _elected(parameters))


def magnitude_prune(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDensity, draw: Draw) -> Pair:
    """Trim each factor, then as ``linear``."""
    return _on_factors(pairs, weights, _trimmed(parameters), _add_up)


def ties_svd(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDenseTies, draw: Draw) -> Pair:
    """``ties`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, parameters, _trimmed(parameters), _elected(parameters))


def dare_linear_svd(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDense, draw: Draw) -> Pair:
    """``dare_linear`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, parameters, _dropped(parameters, draw), _add_up)


def dare_ties_svd(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDenseTies, draw: Draw) -> Pair:
    """``dare_ties`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, parameters, _dropped(parameters, draw), _elected(parameters))


def magnitude_prune_svd(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDense, draw: Draw) -> Pair:
    """``magnitude_prune`` on the dense changes, then SVD."""
    return _on_dense(pairs, weights, parameters, _trimmed(parameters), _add_up)


def _on_factors(pairs: Sequence[Pair], weights: Sequence[float], sparsify: Sparsify, merge: Merge) -> Pair:
    """The factors A_i and the factors B_i merged apart, each with the root of the weight; its sign goes to A."""
    roots = [math.sqrt(abs(c)) for c in weights]
    signed = [math.copysign(root, c) if c else 0.0 for root, c in zip(roots, weights, strict=True)]
    a, b = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    # draws 0 .. n - 1 belong to A, those after them to B: one mask for both would tie their entries together
    return merge(sparsify(a, 0), _column(signed)), merge(sparsify(b, len(pairs)), _column(roots))


def _on_dense(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.PeftDense, sparsify: Sparsify,
              merge: Merge) -> Pair:
    """The changes B_i A_i themselves merged, then cut to a rank (default: the largest of the inputs)."""
    merged = merge(sparsify(torch.stack([product(pair) for pair in pairs]), 0), _column(weights))
    return _values_in_b(low_rank(merged, parameters.rank or max(a.shape[0] for a, _ in pairs)).pair)


def _column(weights: Sequence[float]) -> Tensor:
    """(n, 1, 1), to weigh a stack of n matrices."""
    return torch.tensor(weights).view(-1, 1, 1)


def _values_in_b(pair: Pair) -> Pair:
    """B = U S and A = V^T of evenly split factors."""
    a, b = pair
    # of evenly split factors the rows of A have the norms sqrt(s_i)
    roots = a.norm(dim=1)
    return a / roots.clamp_min(1e-30)[:, None], b * roots


def _everything(stacked: Tensor, first_draw: int) -> Tensor:
    """(n, ..) -> (n, ..): as it is."""
    return stacked


def _trimmed(parameters: methods.PeftDensity) -> Sparsify:
    return lambda stacked, first_draw: trim_as_peft(stacked, parameters.density)


def _dropped(parameters: methods.PeftDensity, draw: Draw) -> Sparsify:
    """DARE with a draw for each tensor of the stack."""
    def sparsify(stacked: Tensor, first_draw: int) -> Tensor:
        """(n, ..) -> (n, ..)."""
        if parameters.density >= 1:
            return stacked
        return torch.stack([drop(tensor, kept_below(draw(first_draw + i, tuple(tensor.shape)), parameters.density),
                                 parameters.density) for i, tensor in enumerate(stacked)])

    return sparsify


def _elected(parameters: methods.PeftTies | methods.PeftDenseTies) -> Merge:
    return lambda stacked, weights: elect_as_peft(stacked, weights, parameters.majority_sign_method)


def _add_up(stacked: Tensor, weights: Tensor) -> Tensor:
    """(n, ..), (n, 1, 1) -> (..): the weighted sum."""
    return (stacked * weights).sum(0)
