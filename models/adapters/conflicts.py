"""Where adapters get into each other's way, before they are fused: per module and pair.

Norms, cosines and angles are exact and come from the k x k matrices of ``core_space``; only signs need entries of B A, which
are taken on whole rows: all of them up to ``SIGN_ROWS``, else that many, picked at random by module name and seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

import console
from models.adapters.files import Adapter, in_order
from models.operators.core_space import project
from models.operators.low_rank import pick_rank, product
from models.operators.noise import uniform

SIGN_ROWS = 256


@dataclass(frozen=True)
class Conflict:
    """Two adapters on one module; D = B A is an adapter's change.

    Args:
        cosine: <D1, D2> / (||D1|| ||D2||): -1 opposed, 0 independent, 1 the same direction.
        norm_ratio: ||D2|| / ||D1||.
        overlap: mean squared cosine of the principal angles between their column spaces (what they write to), 0 to 1.
        angle: the smallest of these angles, degrees.
        overlap_in: as overlap, between their row spaces (what they read).
        sign: share of the entries in which D1 and D2 have opposite signs; 0.5 for independent ones.
    """

    module: str
    one: str
    two: str
    norm_one: float
    norm_two: float
    cosine: float
    norm_ratio: float
    overlap: float
    angle: float
    overlap_in: float
    sign: float


def measure(adapters: Sequence[Adapter], seed: int) -> list[Conflict]:
    """Every pair of adapters on every module that both train."""
    shared = [m for m in in_order(adapters) if sum(m in a.modules for a in adapters) > 1]
    bar = tqdm(shared, "conflicts", disable=console.hidden() or None)
    return [conflict for module in bar for conflict in _module(module, adapters, seed)]


def _module(module: str, adapters: Sequence[Adapter], seed: int) -> list[Conflict]:
    there = [adapter for adapter in adapters if module in adapter.modules]
    pairs = [adapter.modules[module] for adapter in there]
    # norms, cosines and angles do not change with the axes, and these are k x k instead of out x in
    tasks = project(pairs, "core").tasks
    norms = [float(task.norm()) for task in tasks]
    spaces = [_spaces(task) for task in tasks]
    rows = _rows(module, pairs[0][1].shape[0], seed)
    signs = [product((a, b[rows])).sign_() for a, b in pairs]
    conflicts = []
    for i, j in combinations(range(len(there)), 2):
        both = norms[i] * norms[j]
        # cosines of the principal angles: singular values of Q_1^T Q_2 (Bjoerck & Golub 1973); rounding may pass 1
        cosines, cosines_in = (torch.linalg.svdvals(spaces[i][side].T @ spaces[j][side]).clamp(max=1) for side in (0, 1))
        # zeros have no sign: entries that one of the two leaves alone are no conflict
        met = signs[i] * signs[j]
        entries = int(met.count_nonzero())
        conflicts.append(Conflict(
            module, there[i].name, there[j].name, norms[i], norms[j],
            cosine=float((tasks[i] * tasks[j]).sum()) / both if both else 0.0,
            norm_ratio=norms[j] / norms[i] if norms[i] else math.inf if norms[j] else 1.0,
            overlap=float(cosines.square().mean()) if both else 0.0,
            angle=math.degrees(math.acos(float(cosines[0]))) if both else 90.0,
            overlap_in=float(cosines_in.square().mean()) if both else 0.0,
            sign=int((met < 0).sum()) / entries if entries else 0.0))
    return conflicts


def _spaces(task: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes of a change's column space and row space, inside the core."""
    u, values, vh = torch.linalg.svd(task, full_matrices=False)
    rank = pick_rank(values, len(values))
    return u[:, :rank], vh[:rank].T


def _rows(module: str, count: int, seed: int) -> Tensor:
    if count <= SIGN_ROWS:
        return torch.arange(count)
    # evenly spaced rows would fall on the same places of every attention head
    return uniform(seed, f"rows of {module}", 0, 0, count).argsort()[:SIGN_ROWS]


def summary(conflicts: Sequence[Conflict]) -> list[Conflict]:
    """One line per pair over all modules: norms and cosine of the whole changes, means of the rest over modules."""
    lines = []
    for one, two in dict.fromkeys((c.one, c.two) for c in conflicts):
        own = [c for c in conflicts if (c.one, c.two) == (one, two)]
        norm_one, norm_two = (math.hypot(*(getattr(c, f"norm_{side}") for c in own)) for side in ("one", "two"))
        product = sum(c.cosine * c.norm_one * c.norm_two for c in own)
        mean = {name: sum(getattr(c, name) for c in own) / len(own) for name in ("overlap", "angle", "overlap_in", "sign")}
        lines.append(Conflict("all", one, two, norm_one, norm_two,
                              cosine=product / (norm_one * norm_two) if norm_one and norm_two else 0.0,
                              norm_ratio=norm_two / norm_one if norm_one else math.inf, **mean))
    return lines
