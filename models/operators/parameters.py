"""What the operators take beside tensors: one dataclass each, whose fields carry range and help. Loads no torch.

Flags, recipes and their checks follow from these dataclasses, so that one parameter has one name and one meaning everywhere:
``density`` is the share that is kept, ``weight`` belongs to an input, ``lambda_`` scales the fused task vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from models.operators.declared import number

#: A value for every input, in order.
PerInput = tuple[float, ...]
#: Where the k largest entries are sought: in each tensor alone, or in all of them together.
SCOPES = ("tensor", "model")

_WEIGHT = number(1.0, "weight of an input", each=True)
_DENSITY = number(None, "share of a task vector that is kept", 0, 1, each=True)
_LAMBDA = number(1.0, "factor on the fused task vector")
_L1 = number(False, "scale what is kept to the L1 norm of the whole task vector, tensor by tensor")


def _normalize(default: bool) -> Any:
    return number(default, "divide by the sum of the weights that take part")


def _cancelling(weights: PerInput, normalize: bool, way_out: str) -> str | None:
    """What is wrong with weights that shall be divided by their sum; None: nothing."""
    # 0.1 + 0.2 - 0.3 is 0 in exact arithmetic only
    if normalize and abs(math.fsum(weights)) <= 1e-8:
        return f"weights {', '.join(f'{w:g}' for w in weights)} add up to 0, by which they would be divided; {way_out}"
    return None


@dataclass(frozen=True)
class NoParameters:
    pass


@dataclass(frozen=True)
class Linear:
    weight: PerInput = _WEIGHT
    normalize: bool = _normalize(True)

    def fault(self) -> str | None:
        """Why these values make no merge; None where they do."""
        return _cancelling(self.weight, self.normalize, "set normalize to false, or change them")


@dataclass(frozen=True)
class Slerp:
    t: float = number(None, "0: the base model, 1: the other", 0, 1)


@dataclass(frozen=True)
class Passthrough:
    scale: PerInput = number(1.0, "factor on the tensor", each=True)


@dataclass(frozen=True)
class Karcher:
    weight: PerInput = _WEIGHT
    # mergekit's are 10 and 1e-5; a merge of mergekit's recipes takes those
    max_iter: int = number(200, "steps of the iteration at most", 1)
    tol: float = number(1e-12, "step length (an angle) at which it ends; inputs of a norm below it have no direction", 0)

    def fault(self) -> str | None:
        """As Linear's."""
        return _cancelling(self.weight, True, "change them")


@dataclass(frozen=True)
class MultiSlerp:
    weight: PerInput = _WEIGHT
    normalize_weights: bool = number(True, "divide the weights by their sum")
    eps: float = number(1e-8, "added to norms before they divide; a mean direction shorter than it counts as none", 0)

    def fault(self) -> str | None:
        """As Linear's."""
        return _cancelling(self.weight, self.normalize_weights, "set normalize_weights to false, or change them")


@dataclass(frozen=True)
class NuSlerp:
    weight: PerInput = _WEIGHT
    nuslerp_row_wise: bool = number(False, "an angle per vector along the first axis (needs nuslerp_flatten=false)")
    nuslerp_flatten: bool = number(True, "one angle per tensor; false: one per vector along the last axis")


@dataclass(frozen=True)
class NearSwap:
    t: float = number(None, "entries of the base closer than this to the other model's are swapped whole", 0)


@dataclass(frozen=True)
class Ram:
    epsilon: float = number(1e-5, "a smaller change counts as none", 0)


@dataclass(frozen=True)
class RamPlus(Ram):
    r: float = number(0.1, "how much the entries of one input alone gain where it shares many")
    alpha: float = number(0.2, "largest ratio of shared to own entries that counts", 0)


@dataclass(frozen=True)
class ModelStock:
    filter_wise: bool = number(False, "an angle per output row instead of one per tensor")


@dataclass(frozen=True)
class Interpolation:
    alpha: float = number(None, "0: the base model, 1: the fine-tuned model", 0, 1)


@dataclass(frozen=True)
class Resta:
    gamma: float = number(0.5, "factor on the safety vector, aligned - unaligned")
    density: float = number(1.0, "below 1: DARE on the task vector first (RESTA_d)", 0, 1)


@dataclass(frozen=True)
class TaskArithmetic:
    weight: PerInput = _WEIGHT
    normalize: bool = _normalize(False)
    lambda_: float = _LAMBDA


@dataclass(frozen=True)
class Ties:
    weight: PerInput = _WEIGHT
    density: PerInput = _DENSITY
    # the papers' own: TIES averages what agrees, DARE and task arithmetic add up
    normalize: bool = _normalize(True)
    lambda_: float = _LAMBDA
    rescale: bool = _L1
    scope: str = number("tensor", "where the k largest are sought: tensor or model", choices=SCOPES)


@dataclass(frozen=True)
class Dare:
    weight: PerInput = _WEIGHT
    density: PerInput = _DENSITY
    normalize: bool = _normalize(False)
    rescale: bool = number(True, "divide what is kept by the density")
    lambda_: float = _LAMBDA


@dataclass(frozen=True)
class Della(Dare):
    epsilon: PerInput = number(0.15, "keep probabilities run from density - epsilon to density + epsilon by rank", 0, 1,
                               each=True)


@dataclass(frozen=True)
class DellaTies(Della):
    normalize: bool = _normalize(True)


@dataclass(frozen=True)
class Breadcrumbs:
    weight: PerInput = _WEIGHT
    density: PerInput = _DENSITY
    gamma: PerInput = number(0.01, "share of the largest entries that is dropped as outliers", 0, 1, each=True)
    normalize: bool = _normalize(False)
    lambda_: float = _LAMBDA
    rescale: bool = _L1


@dataclass(frozen=True)
class Sce:
    select_topk: float = number(1.0, "share of the entries of non-zero variance that is kept", 0, 1)
    lambda_: float = _LAMBDA
