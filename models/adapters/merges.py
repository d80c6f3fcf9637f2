"""Ways to fuse the LoRA changes of one module. Rows in ``methods.py``; signatures are explained there.

All but ``concatenate`` and ``lego`` meet task matrices M_i of one space, in which the change of adapter i is M_i: exact for
anything linear or spectral, and for entry-wise rules the axes of ``core_space`` (or plain rows and columns: --space dense).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.adapters import methods as methods
from models.operators.drop import drop, kept_below
from models.operators.election import elect
from models.operators.low_rank import Pair, pair_norm, pick_rank
from models.operators.selection import count, trim

#: (adapter, shape) -> numbers from U[0, 1).
Draw = Callable[[int, tuple[int, ...]], Tensor]


def concatenate(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Cat, draw: Draw) -> Pair:
    """The exact weighted sum: sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ..] [A_1; A_2; ..]."""
    return torch.cat([a for a, _ in pairs]), torch.cat([w * b for (_, b), w in zip(pairs, weights, strict=True)], 1)


def weighted(tasks: Sequence[Tensor], weights: Sequence[float], parameters: object, draw: Draw) -> Tensor:
    """sum_i w_i M_i: the exact sum of the changes, without the cross terms B_i A_j of a sum of factors."""
    return sum((w * task for task, w in zip(tasks, weights, strict=True)), torch.zeros_like(tasks[0]))


def _dropped(tasks: Sequence[Tensor], density: float, draw: Draw) -> list[Tensor]:
    """DARE on every task with draws of its own."""
    return [drop(task, kept_below(draw(i, tuple(task.shape)), density), density) for i, task in enumerate(tasks)]


def ties(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Sparse, draw: Draw) -> Tensor:
    """Trim, elect sign, disjoint merge (Yadav et al. 2023); in the space "left" this is KnOTS-TIES (Stoica et al. 2024)."""
    return elect([trim(task, parameters.density) for task in tasks], weights)


def dare_linear(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Sparse, draw: Draw) -> Tensor:
    """Drop and rescale, then the weighted sum (Yu et al. 2024)."""
    return weighted(_dropped(tasks, parameters.density, draw), weights, parameters, draw)


def dare_ties(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Sparse, draw: Draw) -> Tensor:
    """Drop and rescale, then TIES' election."""
    return elect(_dropped(tasks, parameters.density, draw), weights)


def magnitude_prune(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Sparse, draw: Draw) -> Tensor:
    """Trim, then the weighted sum."""
    return weighted([trim(task, parameters.density) for task in tasks], weights, parameters, draw)


def tsv(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Tsv, draw: Draw) -> Tensor:
    """TSV-M (Gargiulo et al. 2024, algorithm 1): the leading 1/n of each task's singular triples, made orthogonal.

    U = [U_1 .. U_n] and V are replaced by their nearest orthogonal matrices (Procrustes), so that tasks interfere no more;
    the result is U_o diag(w_i sigma_i) V_o^T.
    """
    lefts, values, rights = [], [], []
    for task, weight in zip(tasks, weights, strict=True):
        u, s, vh = torch.linalg.svd(task, full_matrices=False)
        # 1/n of the directions that there are: an adapter of rank 4 has no more to give than 4
        kept = count(parameters.density or 1 / len(tasks), pick_rank(s, len(s)))
        lefts.append(u[:, :kept])
        values.append(weight * s[:kept])
        rights.append(vh[:kept].T)
    left, right = (_nearest_orthogonal(torch.cat(vectors, 1)) for vectors in (lefts, rights))
    return left * torch.cat(values) @ right.T


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition: the solution of the Procrustes problem (Schoenemann 1966)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def isotropic(tasks: Sequence[Tensor], weights: Sequence[float], parameters: methods.Rank, draw: Draw) -> Tensor:
    """Iso-C (Marczak et al. 2025, equation 6): the weighted sum with its singular values replaced by their mean.

    The mean is over the values that a LoRA of ``rank`` can hold, or over all that are not negligible.
    """
    u, values, vh = torch.linalg.svd(weighted(tasks, weights, parameters, draw), full_matrices=False)
    kept = pick_rank(values, parameters.rank or len(values))
    return values[:kept].mean() * u[:, :kept] @ vh[:kept]


def lego(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Rank, draw: Draw) -> Pair:
    """LoRA-LEGO (Zhao et al. 2024): rank-1 units (a_j, b_j) of all adapters, clustered by k-means, centroids as a LoRA.

    Units are taken as trained, with ||a_j|| = ||b_j|| (the same unit, and no side outweighs the other): unlike the other
    methods this one depends on how the change is split into factors. Weights are shares: a unit counts w_i times, and the
    result is multiplied by their sum. A centroid gets the mean norm of its cluster back (averaging shrinks it), and the
    whole is multiplied by sqrt(mean input rank / k), so that k units vary as much as one adapter's; the paper names both
    corrections, the formulas are read from its text.

    Raises:
        ValueError: a weight is negative.
    """
    from sklearn.cluster import KMeans

    if min(weights) < 0:
        raise ValueError("lego takes weights of 0 and more: they are shares of a mean")
    units, shares = [], []
    for (a, b), weight in zip(pairs, weights, strict=True):
        size_a, size_b = a.norm(dim=1).double(), b.norm(dim=0).double()
        # a unit of zeros, and one that counts nothing, would make a cluster of its own
        counted = (size_a > 0) & (size_b > 0) & (weight > 0)
        balance = (size_b / size_a)[counted].sqrt()[:, None]
        units.append(torch.cat([a.double()[counted] * balance, b.T.double()[counted] / balance], 1))
        shares.append(torch.full((len(units[-1]),), float(weight), dtype=torch.float64))
    points, share = torch.cat(units), torch.cat(shares)
    k = min(parameters.rank or max(a.shape[0] for a, _ in pairs), len(points))
    inputs = pairs[0][0].shape[1]
    if not k:
        return pairs[0][0][:1] * 0, pairs[0][1][:, :1] * 0
    # distances survive in the points' own span, which is as small as their number
    small = torch.linalg.qr(points.T).R.T
    means = KMeans(k, n_init=8, random_state=int(float(draw(0, (1,))) * 2**31))
    labels = torch.from_numpy(means.fit(small.numpy(), sample_weight=share.numpy()).labels_).long()
    member = torch.nn.functional.one_hot(labels, k).double() * share[:, None]
    member /= member.sum(0)
    centroids = member.T @ points
    norms = member.T @ points.norm(dim=1)
    # units that cancel leave a centroid of rounding errors, which must not be blown up
    restored = norms / centroids.norm(dim=1).maximum(1e-6 * norms)
    rank = sum(a.shape[0] for a, _ in pairs) / len(pairs)
    centroids *= restored[:, None] * ((rank / k) ** 0.5 * sum(weights)) ** 0.5
    return centroids[:, :inputs].float(), centroids[:, inputs:].T.float().contiguous()


def random_directions(pairs: Sequence[Pair], weights: Sequence[float], parameters: methods.Rank, draw: Draw) -> Pair:
    """The control of every fusion: Gaussian factors with the Frobenius norm of the weighted sum, and nothing else of it.

    What it does to a model, any change of that size does.
    """
    a, b = concatenate(pairs, weights, methods.Cat(), draw)
    rank = parameters.rank or max(first.shape[0] for first, _ in pairs)
    # Gaussian by quantiles of the counted draws; 0 and 1 have none
    left, right = (torch.special.ndtri(draw(which, shape).double().clamp(1e-9, 1 - 1e-9)) for which, shape in (
        (0, (rank, a.shape[1])), (1, (b.shape[0], rank))))
    return left.float(), (right * (pair_norm((a, b)) / pair_norm((left, right)))).float()
