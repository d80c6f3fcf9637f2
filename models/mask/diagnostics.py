"""A trained mask in numbers: kept share and entropy by layer and module, agreement between masks, overlap of tasks."""

from __future__ import annotations

import itertools
from collections import defaultdict
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
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for name, logits in mask.logits.items():
        if not logits.numel():
            continue  # a factor of rank 0 has none
        layer = layer_of(name)
        rows["none" if layer is None else str(layer), module_of(name)].append(_of(logits))
    groups: dict[str, dict[str, list]] = {"layers": defaultdict(list), "modules": defaultdict(list)}
    grid: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (layer, module), found in rows.items():
        groups["layers"][layer] += found
        groups["modules"][module] += found
        both = _together(found)
        grid[module][layer] = {key: both[key] for key in ("kept", "entropy")}
    everything = [row for found in rows.values() for row in found]
    return {"whole": _together(everything), **{kind: {name: _together(found) for name, found in group.items()}
                                               for kind, group in groups.items()}, "grid": dict(grid)}


def _check_logits(mask: Mask, label: str) -> None:
    label = label or "this mask"
    if not any(values.numel() for values in mask.logits.values()):
        raise UserError(f"{label}: holds no logits, so nothing can be measured; train it again with another --mask_exclude")
    if odd := [name for name, values in mask.logits.items() if not torch.isfinite(values).all()]:
        raise UserError(f"{label}: logits of {odd[0]} and {len(odd) - 1} more tensors are not finite; train it again with a "
                        "lower --learning_rate")


def _of(logits: Tensor) -> dict[str, float]:
    values = logits.double()
    return {"count": values.numel(), "kept": float(torch.sigmoid(values).mean()), "entropy": float(entropy(values).mean()),
            "positive": float((values > 0).double().mean()), "mean": float(values.mean()),
            "square": float(values.square().mean()), "largest": float(values.abs().max())}


def _together(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    count = sum(row["count"] for row in rows)
    found = {key: sum(row[key] * row["count"] for row in rows) / count
             for key in ("kept", "entropy", "positive", "mean", "square")}
    found["spread"] = max(found.pop("square") - found["mean"] ** 2, 0.0) ** 0.5
    return {"count": count, **found, "largest": max(row["largest"] for row in rows)}


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
    # each with noise of its own: shared uniforms would look like agreement
    kept = {label: torch.cat([m.reshape(-1) > 0.5 for _, m in read_out(mask.logits, mask.settings, readout, seed)])
            for seed, (label, mask) in enumerate(masks.items())}
    ranks = {label: _ranks(mask) for label, mask in masks.items()}
    pairs = []
    for one, two in itertools.combinations(masks, 2):
        a, b = kept[one], kept[two]
        either = int((a | b).sum())
        p, q = float(a.double().mean()), float(b.double().mean())
        pairs.append({"one": one, "two": two, "jaccard": int((a & b).sum()) / either if either else 1.0,
                      "chance": p * q / (p + q - p * q) if p + q else 1.0, "spearman": _correlation(ranks[one], ranks[two])})
    return {"readout": str(readout), "pairs": pairs}


def _ranks(mask: Mask) -> Tensor:
    from scipy.stats import rankdata

    flat = torch.cat([value.float().reshape(-1) for value in mask.logits.values()])
    step = max(1, flat.numel() // SAMPLE)
    return torch.from_numpy(rankdata(flat[::step].numpy()))


def _correlation(one: Tensor, two: Tensor) -> float | None:
    """Pearson's r of ranks, which is Spearman's; None for a mask whose logits are all equal."""
    a, b = one - one.mean(), two - two.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else None


def task_overlap(mask: Mask, aligned: Model, tasks: Sequence[Model], readout: Readout | None = None) -> dict[str, Any]:
    """How much of each task vector's energy the shared mask keeps, and how far the tasks' vectors lie over each other.

    Returns:
        {"kept_energy": {task: share}, "pairs": [{"one", "two", "cosine", "same_sign"}]}: ``same_sign`` is the share of
        entries, weighted by the product of their magnitudes, on which two tasks agree.
    """
    values = dict(read_out(mask.logits, mask.settings, readout or Readout("expected")))
    energy = torch.zeros(len(tasks), dtype=torch.float64)
    kept = torch.zeros_like(energy)
    inner = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    size = torch.zeros_like(inner)
    for spec in plan(mask.settings, aligned, tasks):
        _, deltas = tensors_of(spec, aligned, tasks)
        whole = torch.ones(1, 1) if spec.units is None else spec.units.expand(values[spec.name])
        flat = [d.view(spec.matrix).double() for d in deltas]
        for i, one in enumerate(flat):
            energy[i] += float(one.square().sum())
            kept[i] += float((one.square() * whole).sum())
            for j in range(i):
                product = one * flat[j]
                inner[i, j] += float(product.sum())
                size[i, j] += float(product.abs().sum())
    names = [task.name for task in tasks]
    pairs = [{"one": names[j], "two": names[i],
              "cosine": float(inner[i, j] / (energy[i] * energy[j]).sqrt()) if energy[i] * energy[j] else None,
              "same_sign": float((1 + inner[i, j] / size[i, j]) / 2) if size[i, j] else None}
             for i in range(len(tasks)) for j in range(i)]
    return {"kept_energy": {name: float(k / e) if e else 1.0 for name, k, e in zip(names, kept, energy, strict=True)},
            "pairs": pairs}
