"""Realign one weight: pure functions on task vectors. Rows in ``methods.py`` (SOMF, spec sections 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.operators.selection import Cut
from models.operators.sparse import elect
from models.realign import methods as methods

Draw = Callable[[str, int, tuple[int, ...]], Tensor]


@dataclass
class Part:
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
    cuts: list[Cut] | None = None
    rule_cuts: list[Cut] | None = None
    notes: dict[str, float] = field(default_factory=dict)


# ---- edits: (part, p) -> task vectors


def random_mask(part: Part, p: methods.RandomMask) -> list[Tensor]:
    """m * delta_i with one random mask for all tasks: what a trained mask must beat.

    Hard: Bernoulli(kept). Soft: sigmoid((logit(kept) + logistic noise) / temperature), SOMF's draw at constant logits.
    """
    like = part.deltas[0]
    draws = part.draw("mask", 0, tuple(like.shape)).to(like)
    if p.soft:
        draws = draws.clamp(1e-6, 1 - 1e-6)
        offset = math.log(p.kept / (1 - p.kept)) if p.kept < 1 else math.inf
        mask = torch.sigmoid((draws.logit() + offset) / p.temperature)
    else:
        mask = (draws < p.kept).to(like)
    mean = float(mask.mean()) if mask.numel() else 1.0
    part.notes["kept"] = mean
    # a small tensor may lose every entry: 0 / 0 must not become NaN
    scale = 1 / mean if p.rescale and mean else 1.0
    return [delta * mask * scale for delta in part.deltas]


def magnitude(part: Part, p: methods.Magnitude) -> list[Tensor]:
    """The largest entries of each task vector (``Part.cuts``)."""
    done = []
    for delta, cut in zip(part.deltas, part.cuts, strict=True):
        mask = cut.mask(delta)
        kept = float(mask.float().mean()) if mask.numel() else 1.0
        done.append(delta * mask * (1 / kept if p.rescale and kept else 1.0))
    return done


def dare(part: Part, p: methods.Dare | methods.Resta | methods.DareSum, purpose: str = "dare") -> list[Tensor]:
    """Each entry is dropped with probability ``drop``, the others divided by 1 - drop (Yu et al. 2024, equation 3)."""
    if not p.drop:
        return part.deltas
    return [delta * (part.draw(purpose, i, tuple(delta.shape)).to(delta) >= p.drop) / (1 - p.drop)
            for i, delta in enumerate(part.deltas)]


# ---- rules: (task vectors, part, p) -> fused


def single(vectors: Sequence[Tensor], part: Part, p: methods.Single) -> Tensor:
    """The only task's vector, coefficient 1."""
    (vector,) = vectors
    return vector


def add_up(vectors: Sequence[Tensor], part: Part, p: methods.TaskArithmetic) -> Tensor:
    """lambda sum_i v_i (Ilharco et al. 2023)."""
    return p.lambda_ * sum(vectors[1:], vectors[0])


def average(vectors: Sequence[Tensor], part: Part, p: methods.NoParameters) -> Tensor:
    """1/K sum_i v_i."""
    return sum(vectors[1:], vectors[0]) / len(vectors)


def ties(vectors: Sequence[Tensor], part: Part, p: methods.Ties) -> Tensor:
    """Trim over the whole vector, elect the sign of the sum, add up what agrees (not its mean): SOMF's TIES."""
    kept = [vector * cut.mask(vector) for vector, cut in zip(vectors, part.rule_cuts, strict=True)]
    return p.lambda_ * elect(kept, [1.0] * len(kept), normalize=False)


def drop_and_add(vectors: Sequence[Tensor], part: Part, p: methods.DareSum) -> Tensor:
    """lambda sum_i DARE(v_i)."""
    dropped = dare(Part(list(vectors), part.draw), p, "rule")
    return p.lambda_ * sum(dropped[1:], dropped[0])


# ---- finishes: (fused, part, p) -> fused


def shrink(fused: Tensor, part: Part, p: methods.WiseFt) -> Tensor:
    """alpha delta: theta = (1 - alpha) theta_aligned + alpha theta_tuned."""
    return p.alpha * fused


def add_safety(fused: Tensor, part: Part, p: methods.Resta) -> Tensor:
    """theta_tuned + gamma (theta_aligned - theta_unaligned)."""
    return fused if part.alignment is None else fused + p.gamma * part.alignment


def projected(change: Tensor, alignment: Tensor, exact: bool, floor: float = 0.0) -> Tensor:
    """C change, with C = V V^T / ||V||_F (Hsu et al. 2024, equation 2), or the orthogonal projection on V's columns.

    Args:
        change, alignment: (out, in).
        floor: singular values of ``alignment`` up to this are rounding and span nothing (``exact`` only).
    """
    if exact:
        u, values, _ = torch.linalg.svd(alignment.double(), full_matrices=False)
        u = u[:, values > max(1e-6 * float(values[0]), floor)]
        return (u @ (u.T @ change.double())).to(change)
    # the smaller of V^T change (in x in) and V V^T (out x out)
    if alignment.shape[0] < alignment.shape[1]:
        return (alignment @ alignment.T) @ change / alignment.norm()
    return alignment @ (alignment.T @ change) / alignment.norm()


def _strays(fused: Tensor, part: Part, tau: float, exact: bool) -> Tensor | None:
    """The projection of a change whose cosine with it is below tau; None where it is not, or there is no subspace."""
    v = part.alignment
    if v is None or fused.dim() != 2 or not float(v.norm()) or not float(fused.norm()):
        return None
    inside = projected(fused, v, exact, part.floor)
    size = float(inside.norm()) * float(fused.norm())
    part.notes["cosine"] = float((inside * fused).sum()) / size if size else 0.0
    if part.notes["cosine"] >= tau:
        return None
    part.notes["changed"] = 1.0
    return inside


def project(fused: Tensor, part: Part, p: methods.SafeLora) -> Tensor:
    """Safe LoRA: C change where cos(C change, change) < tau, layer by layer; data-free."""
    inside = _strays(fused, part, p.tau, p.exact)
    return fused if inside is None else inside


def merge_unsafe(fused: Tensor, part: Part, p: methods.SafeMerge) -> Tensor:
    """SafeMERGE: alpha change + (1 - alpha) safe change where cos(C change, change) < tau; other layers stay."""
    if _strays(fused, part, p.tau, exact=False) is None:
        return fused
    return p.alpha * fused + (1 - p.alpha) * (torch.zeros_like(fused) if part.safe is None else part.safe)


def realigned(part: Part, method: methods.Row, p: object, rule: methods.Row, q: object) -> Tensor:
    """finish(rule(edit(deltas))): the fused change of one weight."""
    edit, finish = method.load("edit"), method.load("finish")
    vectors = edit(part, p) if edit else part.deltas
    fused = rule.load("finish")(vectors, part, q)
    return finish(fused, part, p) if finish else fused
