"""TIES' election and disjoint merge (Yadav et al. 2023, algorithm 1, steps 2 and 3), once, with the variants of the field.

    gamma = sgn(sum_i w_i delta_i),    result = sum of the w_i delta_i whose sign is gamma (or their mean)

Entry by entry; a sum of exactly 0 elects plus, and an entry of 0 agrees with neither sign. What differs between the
variants is who votes (weighted or plain deltas, their signs alone, masked ones) and what the sum is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elect_(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Elect signs by the weighted sum and merge what agrees; the reference, and the merges' inner loop. Consumes ``deltas``.

    Args:
        deltas: float tensors of one shape; overwritten, for a merge has no memory for copies of its inputs.
        normalize: divide by |w_i| of the entries that agree, which makes the sum a mean.
    """
    ballots = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = ballots[0].clone()
    for ballot in ballots[1:]:
        total.add_(ballot)
    # float arithmetic throughout: masks of another type would double the traffic. sgn(sgn(t) + 1/2) is 1 at t = 0
    sign = total.sign_().add_(0.5).sign_()
    merged = torch.zeros_like(sign)
    shares = torch.zeros_like(sign) if normalize else None
    for ballot, weight in zip(ballots, weights, strict=True):
        # turned by the elected sign, what agrees is positive and what does not is cut off at 0
        agreeing = ballot.mul_(sign).clamp_min_(0)
        merged.add_(agreeing)
        if shares is not None:
            # |w|: by a negative weight alone on an entry, its sign would come back
            shares.add_(agreeing.sign_(), alpha=abs(weight))
    if shares is not None:
        # where nothing agrees, 0 / 0 becomes 0 / 1
        merged.div_(shares.add_(shares == 0))
    return merged.mul_(sign)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """``elect_`` that leaves its inputs alone. Only the weights' proportions matter when normalised."""
    return elect_([delta.clone() for delta in deltas], weights, normalize)


def agrees(values: Tensor, negative: Tensor) -> Tensor:
    """(..), (..) bool -> (..) bool: whether entries have the elected sign; 0 never has.

    Args:
        negative: where minus was elected, ``votes < 0``: with this comparison a sum of exactly 0 elects plus.
    """
    return torch.where(negative, values < 0, values > 0)


def disjoint_sum(deltas: Sequence[Tensor], ballots: Sequence[Tensor]) -> Tensor:
    """sum_i delta_i where ballot i has the elected sign, in the ballots' type: the variant of SOMF's masks.

    Masked and trimmed task vectors vote, but the plain ones are added: the mask is multiplied on afterwards, for its
    gradient needs the sum without it.
    """
    total = ballots[0].clone()
    for ballot in ballots[1:]:
        total += ballot
    negative = total < 0
    merged = torch.zeros_like(total)
    for delta, ballot in zip(deltas, ballots, strict=True):
        merged += delta * agrees(ballot, negative)
    return merged


def elect_unweighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """SCE's variant (Wan et al. 2024, "erase"): plain deltas vote, the mean of those that agree is weighted by w_i.

    The weights are shares of energy, which the vote already contains: weighted votes would count it twice.
    """
    negative = torch.stack(list(deltas)).sum(0) < 0
    agreeing = [agrees(delta, negative) for delta in deltas]
    merged = sum(delta * agree * w for delta, agree, w in zip(deltas, agreeing, weights, strict=True))
    shares = sum(agree * w for agree, w in zip(agreeing, weights, strict=True))
    return merged / shares.masked_fill(shares == 0, 1)


def elect_as_peft(deltas: Tensor, weights: Tensor, majority: str) -> Tensor:
    """(n, ..), (n, 1, ..) -> (..): PEFT 0.21's ``disjoint_merge``, for --compat peft.

    Differs twice from TIES as published: votes are unweighted ("total": their sum; "frequency": the majority of signs),
    and the weighted sum is divided by the number of entries that agree instead of their weight.
    """
    votes = deltas.sum(0) if majority == "total" else deltas.sign().sum(0)
    agree = agrees(deltas, votes < 0)
    return (deltas * weights * agree).sum(0) / agree.sum(0).clamp(min=1)
