"""Realign one weight: pure functions on task vectors. Rows in ``methods.py`` (SOMF, spec sections 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.operators.drop import drop, kept_above, kept_below
from models.operators.election import elect_
from models.operators.selection import MagnitudeCut
from models.realign import methods as methods

#: (purpose, task, shape) -> numbers from U[0, 1).
Draw = Callable[[str, int, tuple[int, ...]], Tensor]


@dataclass
class WeightInputs:
    """One weight of all models, fp32.

    Args:
        deltas: task_i - aligned.
        draw: (purpose, task, shape) -> numbers from U[0, 1), a function of seed, tensor, purpose and task alone.
        alignment: aligned - unaligned; None: not given.
        floor: size of singular values of ``alignment`` that rounding of the stored weights alone makes.
        safe: safety-tuned - aligned; None: not given.
        cuts: per task, the k largest entries that the method keeps; used up as weights go by in order.
        rule_cuts: the same for the rule.
        notes: what a function reports of this weight, by name.
    """

    deltas: list[Tensor]
    draw: Draw
    alignment: Tensor | None = None
    floor: float = 0.0
    safe: Tensor | None = None
    cuts: list[MagnitudeCut] | None = None
    rule_cuts: list[MagnitudeCut] | None = None
    notes: dict[str, float] = field(default_factory=dict)


# ---- edits: (weight, parameters) -> task vectors


def random_mask(weight: WeightInputs, parameters: methods.RandomMask) -> list[Tensor]:
    """m * delta_i with one random mask for all tasks: what a trained mask must beat.

    Hard: Bernoulli(kept). Soft: sigmoid((logit(kept) + logistic noise) / temperature), SOMF's draw at constant logits.
    """
    like = weight.deltas[0]
    draws = weight.draw("mask", 0, tuple(like.shape)).to(like)
    if parameters.soft:
        draws = draws.clamp(1e-6, 1 - 1e-6)  # 0 has no logit
        offset = math.log(parameters.density / (1 - parameters.density)) if parameters.density < 1 else math.inf
        mask = torch.sigmoid((draws.logit() + offset) / parameters.temperature)
    else:
        mask = kept_below(draws, parameters.density).to(like)
    mean = float(mask.mean()) if mask.numel() else 1.0
    weight.notes["kept"] = mean
    # a small tensor may lose every entry: 0 / 0 must not become NaN
    scale = 1 / mean if parameters.rescale and mean else 1.0
    return [delta * mask * scale for delta in weight.deltas]


def magnitude(weight: WeightInputs, parameters: methods.Magnitude) -> list[Tensor]:
    """The largest entries of each task vector (``WeightInputs.cuts``)."""
    pruned = []
    for delta, cut in zip(weight.deltas, _given(weight.cuts), strict=True):
        mask = cut.mask(delta)
        # of a cut over the model, the share that this weight keeps is its own
        kept = float(mask.float().mean()) if mask.numel() else 1.0
        pruned.append(delta * mask * (1 / kept if parameters.rescale and kept else 1.0))
    return pruned


def _given(cuts: list[MagnitudeCut] | None) -> list[MagnitudeCut]:
    if cuts is None:
        raise ValueError("what keeps the largest entries needs a cut for each task")
    return cuts


def dare(weight: WeightInputs, parameters: methods.Dare | methods.Resta | methods.DareSum, purpose: str = "dare",
         ) -> list[Tensor]:
    """Each entry is dropped with probability ``drop``, the others divided by 1 - drop (Yu et al. 2024, equation 3)."""
    if not parameters.drop:
        return weight.deltas
    density = parameters.density
    return [drop(delta, kept_above(weight.draw(purpose, i, tuple(delta.shape)).to(delta), density), density)
            for i, delta in enumerate(weight.deltas)]


# ---- rules: (task vectors, weight, parameters) -> fused


def single(vectors: Sequence[Tensor], weight: WeightInputs, parameters: methods.Single) -> Tensor:
    """The only task's vector, coefficient 1."""
    (vector,) = vectors
    return vector


def add_up(vectors: Sequence[Tensor], weight: WeightInputs, parameters: methods.TaskArithmetic) -> Tensor:
    """lambda sum_i v_i (Ilharco et al. 2023)."""
    return parameters.lambda_ * sum(vectors[1:], vectors[0])


def average(vectors: Sequence[Tensor], weight: WeightInputs, parameters: methods.NoParameters) -> Tensor:
    """1/K sum_i v_i."""
    return sum(vectors[1:], vectors[0]) / len(vectors)


def ties(vectors: Sequence[Tensor], weight: WeightInputs, parameters: methods.Ties) -> Tensor:
    """Trim over the whole vector, elect the sign of the sum, add up what agrees (not its mean): SOMF's TIES."""
    kept = [vector * cut.mask(vector) for vector, cut in zip(vectors, _given(weight.rule_cuts), strict=True)]
    return parameters.lambda_ * elect_(kept, [1.0] * len(kept), normalize=False)


def drop_and_add(vectors: Sequence[Tensor], weight: WeightInputs, parameters: methods.DareSum) -> Tensor:
    """lambda sum_i DARE(v_i)."""
    # a purpose of its own: after an edit by DARE the same draws would drop the same entries again
    dropped = dare(WeightInputs(list(vectors), weight.draw), parameters, "rule")
    return parameters.lambda_ * sum(dropped[1:], dropped[0])


# ---- finishes: (fused, weight, parameters) -> fused


def shrink(fused: Tensor, weight: WeightInputs, parameters: methods.WiseFt) -> Tensor:
    """alpha delta: theta = (1 - alpha) theta_aligned + alpha theta_tuned."""
    return parameters.alpha * fused


def add_safety(fused: Tensor, weight: WeightInputs, parameters: methods.Resta) -> Tensor:
    """theta_tuned + gamma (theta_aligned - theta_unaligned)."""
    return fused if weight.alignment is None else fused + parameters.gamma * weight.alignment


def projected(change: Tensor, alignment: Tensor, exact: bool, floor: float = 0.0) -> Tensor:
    """C change, with C = V V^T / ||V||_F (Hsu et al. 2024, equation 2), or the orthogonal projection on V's columns.

    Args:
        change, alignment: (out, in).
        floor: singular values of ``alignment`` up to this are rounding and span nothing (``exact`` only).
    """
    if exact:
        # fp64: beside a large change, rounding in fp32 would open directions that the alignment does not have
        u, values, _ = torch.linalg.svd(alignment.double(), full_matrices=False)
        u = u[:, values > max(1e-6 * float(values[0]), floor)]
        return (u @ (u.T @ change.double())).to(change)
    # the smaller of V^T change (in x in) and V V^T (out x out)
    if alignment.shape[0] < alignment.shape[1]:
        return (alignment @ alignment.T) @ change / alignment.norm()
    return alignment @ (alignment.T @ change) / alignment.norm()


def _strays(fused: Tensor, weight: WeightInputs, tau: float, exact: bool) -> Tensor | None:
    """The projection of a change whose cosine with it is below tau; None where it is not, or there is no subspace."""
    alignment = weight.alignment
    # norms and biases have no subspace, and the paper's C divides by ||V||
    if alignment is None or fused.dim() != 2 or not float(alignment.norm()) or not float(fused.norm()):
        return None
    inside = projected(fused, alignment, exact, weight.floor)
    size = float(inside.norm()) * float(fused.norm())
    weight.notes["cosine"] = float((inside * fused).sum()) / size if size else 0.0
    if weight.notes["cosine"] >= tau:
        return None
    weight.notes["changed"] = 1.0
    return inside


def project(fused: Tensor, weight: WeightInputs, parameters: methods.SafeLora) -> Tensor:
    """Safe LoRA: C change where cos(C change, change) < tau, layer by layer; data-free."""
    inside = _strays(fused, weight, parameters.tau, parameters.exact)
    return fused if inside is None else inside


def merge_unsafe(fused: Tensor, weight: WeightInputs, parameters: methods.SafeMerge) -> Tensor:
    """SafeMERGE: alpha change + (1 - alpha) safe change where cos(C change, change) < tau; other layers stay."""
    if _strays(fused, weight, parameters.tau, exact=False) is None:
        return fused
    # where the safety tuning left the weight alone, its change is zero
    safe = torch.zeros_like(fused) if weight.safe is None else weight.safe
    return parameters.alpha * fused + (1 - parameters.alpha) * safe


# ---- a weight through all three


def edited(weight: WeightInputs, method: methods.Row, parameters: object) -> list[Tensor]:
    """The task vectors as the method leaves them; uses ``weight.cuts`` up to this weight."""
    edit = method.load("edit")
    return edit(weight, parameters) if edit else weight.deltas


def merged(vectors: Sequence[Tensor], weight: WeightInputs, method: methods.Row, parameters: object, rule: methods.Row,
           rule_parameters: object) -> Tensor:
    """finish(rule(vectors)): the fused change, from edited task vectors; uses ``weight.rule_cuts`` up to this weight."""
    fuse, finish = rule.load("finish"), method.load("finish")
    if fuse is None:
        raise ValueError(f"{rule.source}: a rule without a function")
    fused = fuse(vectors, weight, rule_parameters)
    return finish(fused, weight, parameters) if finish else fused


def realigned(weight: WeightInputs, method: methods.Row, parameters: object, rule: methods.Row, rule_parameters: object,
              ) -> Tensor:
    """finish(rule(edit(deltas))): the fused change of one weight."""
    return merged(edited(weight, method, parameters), weight, method, parameters, rule, rule_parameters)
