"""A trained mask in numbers: kept share and entropy by layer and module, agreement between masks, overlap of tasks."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from models.adapters.files import layer_of
from models.mask.concrete import entropy
from models.mask.files import Mask
from models.mask.readout import read_out
from models.mask.settings import Readout
from models.mask.slots import plan, tensors_of
from models.task_vectors import Model

#: Logits that rank correlations are taken over at most; evenly spaced, the same for every mask.
SAMPLE = 1_000_000


def module_of(name: str) -> str:
    """The last module name of a tensor: q_proj, embed_tokens, input_layernorm; factors keep their letter."""
    parts = [part for part in name.split(".") if part != "weight"]
    return f"{parts[-2]} {parts[-1][-1]}" if parts[-1].startswith("lora_") else parts[-1]


def mask_numbers(mask: Mask, label: str = "") -> dict[str, Any]:
    """Kept share (mean of sigmoid(s)), entropy in bits, share above 1/2, spread of logits: whole, by layer, by module.

    Args:
        label: the mask's name, for errors.

    Returns:
        {"whole": {...}, "layers": {layer: {...}}, "modules": {module: {...}}, "grid": {module: {layer: ...}}}; in the grid
        "kept" and "entropy" alone.

    Raises:
        UserError: the mask holds no logits, or some that are no numbers.
    """
    _check_logits(mask, label)
    # a row of numbers per tensor; coarser groups are means of rows weighed by their logits, so that each is read once
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for name, logits in mask.logits.items():
        if not logits.numel():
            continue  # a factor of rank 0 has none
        place = layer_of(name)
        rows["none" if place is None else str(place), module_of(name)].append(_numbers_of(logits))
    groups: dict[str, dict[str, list]] = {"layers": defaultdict(list), "modules": defaultdict(list)}
    grid: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (layer, module), cell in rows.items():
        groups["layers"][layer] += cell
        groups["modules"][module] += cell
        numbers = _pooled(cell)
        grid[module][layer] = {key: numbers[key] for key in ("kept", "entropy")}
    everything = [row for cell in rows.values() for row in cell]
    pooled = {kind: {name: _pooled(members) for name, members in group.items()} for kind, group in groups.items()}
    return {"whole": _pooled(everything), **pooled, "grid": dict(grid)}


def _check_logits(mask: Mask, label: str) -> None:
    label = label or "this mask"
    if not any(values.numel() for values in mask.logits.values()):
        raise UserError(f"{label}: holds no logits, so nothing can be measured; train it again with another --mask_exclude")
    if odd := [name for name, values in mask.logits.items() if not torch.isfinite(values).all()]:
        raise UserError(f"{label}: logits of {odd[0]} and {len(odd) - 1} more tensors are not finite; train it again with a "
                        "lower --learning_rate")


def _numbers_of(logits: Tensor) -> dict[str, float]:
    """One tensor's numbers; "mean" and "square" are of the logits, for the spread of any group it is pooled into."""
    values = logits.double()
    return {"count": values.numel(), "kept": float(torch.sigmoid(values).mean()), "entropy": float(entropy(values).mean()),
            "positive": float((values > 0).double().mean()), "mean": float(values.mean()),
            "square": float(values.square().mean()), "largest": float(values.abs().max())}


def _pooled(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of several tensors as of one."""
    count = sum(row["count"] for row in rows)
    means = {key: sum(row[key] * row["count"] for row in rows) / count
             for key in ("kept", "entropy", "positive", "mean", "square")}
    # E s^2 - (E s)^2, in fp64; equal logits may come out a little below 0
    means["spread"] = max(means.pop("square") - means["mean"] ** 2, 0.0) ** 0.5
    return {"count": count, **means, "largest": max(row["largest"] for row in rows)}


def agreement(masks: Mapping[str, Mask], readout: Readout | None = None) -> dict[str, Any]:
    """How far masks of the same shape agree, pair by pair: Jaccard of what they keep, Spearman of their logits.

    Args:
        masks: name -> mask, e.g. of several seeds or tasks.
        readout: what counts as kept; None: the half with the larger logits, which no overall shift changes.

    Returns:
        {"pairs": [{"one", "two", "jaccard", "chance", "spearman"}]}; ``chance``: Jaccard of independent masks that keep as
        much.

    Raises:
        UserError: fewer than two masks, masks of different tensors, or without logits.
    """
    if len(masks) < 2:
        raise UserError("agreement needs at least two masks")
    for label, mask in masks.items():
        _check_logits(mask, label)
    first = next(iter(masks.values()))
    sizes = {name: value.numel() for name, value in first.logits.items()}
    odd = [label for label, mask in masks.items() if {n: v.numel() for n, v in mask.logits.items()} != sizes]
    if odd:
        raise UserError(f"{', '.join(odd)}: masks other tensors than {next(iter(masks))}; compare masks of one granularity "
                        "on the same weights")
    readout = readout or Readout("top", 0.5)
    kept, both = _kept(masks, tuple(sizes), readout)
    units = sum(sizes.values())
    ranks = {label: _ranks(mask) for label, mask in masks.items()}
    pairs = [{"one": one, "two": two, **_jaccard(kept[one], kept[two], both[one, two], units),
              "spearman": _correlation(ranks[one], ranks[two])} for one, two in itertools.combinations(masks, 2)]
    return {"readout": str(readout), "pairs": pairs}


def _kept(masks: Mapping[str, Mask], tensors: Sequence[str], readout: Readout,
          ) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """(name -> units that a mask keeps, two names -> units that both keep), from one tensor of every mask at a time."""
    kept: Counter[str] = Counter()
    both: Counter[tuple[str, str]] = Counter()
    # each with noise of its own: shared uniforms would look like agreement
    walks = [read_out({name: mask.logits[name] for name in tensors}, mask.settings, readout, seed)
             for seed, mask in enumerate(masks.values())]
    for step in zip(*walks, strict=True):
        here = {label: values.reshape(-1) > 0.5 for label, (_, values) in zip(masks, step, strict=True)}
        kept.update({label: int(values.sum()) for label, values in here.items()})
        both.update({(one, two): int((here[one] & here[two]).sum()) for one, two in itertools.combinations(masks, 2)})
    return kept, both


def _jaccard(kept: int, other: int, both: int, units: int) -> dict[str, float]:
    """|A and B| / |A or B| of what two masks keep of so many units, and of independent masks; 1 for two masks of nothing.

    Independent masks that keep shares p and q meet in p q of the units and cover p + q - p q.
    """
    either = kept + other - both
    share, other_share = kept / units, other / units
    both_by_chance = share * other_share
    return {"jaccard": both / either if either else 1.0,
            "chance": both_by_chance / (share + other_share - both_by_chance) if share + other_share else 1.0}


def _ranks(mask: Mask) -> Tensor:
    """Ranks of the logits, SAMPLE of them at most twice over, ties sharing their mean rank, fp64."""
    from scipy.stats import rankdata

    step = max(1, sum(value.numel() for value in mask.logits.values()) // SAMPLE)
    taken, place = [], 0
    for value in mask.logits.values():
        # every step-th of all logits side by side, which need not stand side by side for it
        taken.append(value.reshape(-1)[-place % step::step].float())
        place += value.numel()
    return torch.from_numpy(rankdata(torch.cat(taken).numpy()))


def _correlation(one: Tensor, two: Tensor) -> float | None:
    """Pearson's r of ranks, which is Spearman's; None for a mask whose logits are all equal."""
    centred, other = one - one.mean(), two - two.mean()
    norms = float(centred.norm() * other.norm())
    return float(centred @ other) / norms if norms else None


def task_overlap(mask: Mask, aligned: Model, tasks: Sequence[Model], readout: Readout | None = None) -> dict[str, Any]:
    """How much of each task vector's energy the shared mask keeps, and how far the tasks' vectors lie over each other.

    Returns:
        {"kept_energy": {task: share}, "pairs": [{"one", "two", "cosine", "same_sign"}]}: ``same_sign`` is the share of
        entries, weighted by the product of their magnitudes, on which two tasks agree.
    """
    masks = dict(read_out(mask.logits, mask.settings, readout or Readout("expected")))
    energy = torch.zeros(len(tasks), dtype=torch.float64)
    kept_energy = torch.zeros_like(energy)
    # below the diagonal: sum of d_i d_j, and of |d_i d_j|
    products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    magnitudes = torch.zeros_like(products)
    for spec in plan(mask.settings, aligned, tasks):
        _, deltas = tensors_of(spec, aligned, tasks)
        values = torch.ones(1, 1) if spec.units is None else spec.units.expand(masks[spec.name])
        matrices = [delta.view(spec.matrix).double() for delta in deltas]
        for i, matrix in enumerate(matrices):
            energy[i] += float(matrix.square().sum())
            kept_energy[i] += float((matrix.square() * values).sum())
            for j in range(i):
                product = matrix * matrices[j]
                products[i, j] += float(product.sum())
                magnitudes[i, j] += float(product.abs().sum())
    names = [task.name for task in tasks]
    # same sign + opposite sign = 1 and same - opposite = products / magnitudes
    pairs = [{"one": names[j], "two": names[i],
              "cosine": float(products[i, j] / (energy[i] * energy[j]).sqrt()) if energy[i] * energy[j] else None,
              "same_sign": float((1 + products[i, j] / magnitudes[i, j]) / 2) if magnitudes[i, j] else None}
             for i in range(len(tasks)) for j in range(i)]
    shares = {name: float(kept / whole) if whole else 1.0
              for name, kept, whole in zip(names, kept_energy, energy, strict=True)}
    return {"kept_energy": shares, "pairs": pairs}
