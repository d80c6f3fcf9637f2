"""LoRA adapters as files: read, checked, compared. Works on the adapter alone, without its base model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError
from manifest import sha256
from models.families import Family

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module name -> (A (r, in), B (out, r) with the scale applied), fp32.

    Args:
        name: for messages.
        folder: where it was read from.
        config: its ``adapter_config.json``.
        modules: module name without PEFT's prefix -> factors.
    """

    name: str
    folder: Path
    config: dict
    modules: dict[str, tuple[Tensor, Tensor]]

    @property
    def sha256(self) -> str:
        return sha256(self.folder / WEIGHTS)


def read_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA adapter, applying each module's own scale (alpha patterns, rank patterns, rsLoRA).

    Raises:
        UserError: no adapter there, damaged file, DoRA, biases or other tensors that are not LoRA pairs.
    """
    name = name or folder.name
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise UserError(f"adapter '{name}': {', '.join(missing)} not in {folder}; "
                        f"train it with align_basemodel.py --moe_flag 0 --task_name {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not valid JSON ({error}); train the adapter again") from None
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise UserError(f"{folder / CONFIG}: {option} is set; a low-rank expert cannot hold it; train without it")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({error}); train the adapter again") from None
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if not match:
            raise UserError(f"{folder / WEIGHTS}: tensor '{key}' is not a LoRA factor; "
                            "only lora_A and lora_B weights can be fused")
        halves.setdefault(match["module"], {})[match["part"]] = tensor.float()
    for module, parts in halves.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise UserError(f"{folder / WEIGHTS}: {module}: lora_A and lora_B do not form a pair")
        if not all(torch.isfinite(part).all() for part in parts.values()):
            raise UserError(f"{folder / WEIGHTS}: {module}: holds NaN or infinity; train the adapter again")
    modules = {m: (p["A"], p["B"] * _scale(config, m, p["A"].shape[0])) for m, p in sorted(halves.items())}
    return Adapter(name, folder, config, modules)


def ffn_factors(adapter: Adapter, family: Family, num_layers: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """An adapter's factors by layer and projection ("gate", "up", "down").

    Raises:
        UserError: it touches anything but the FFN (attention, norms, embeddings), or leaves a projection out.
    """
    names = {f"{family.layers}.{i}.{family.ffn}.{p}": (i, kind) for i in range(num_layers)
             for p, kind in zip(family.projections, ("gate", "up", "down"), strict=True)}
    foreign = sorted(set(adapter.modules) - set(names))
    if foreign:
        raise UserError(
            f"adapter '{adapter.name}' in {adapter.folder}: trains {foreign[0]}"
            f"{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, which is not an FFN projection of this base; "
            f"allowed: {', '.join(family.projections)}; train it with --moe_flag 0, which trains only those"
        )
    absent = sorted(set(names) - set(adapter.modules))
    if absent:
        raise UserError(f"adapter '{adapter.name}' in {adapter.folder}: has no factors for {absent[0]} "
                        f"({len(absent)} of {len(names)} missing); an expert needs every FFN projection of every layer")
    layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(num_layers)]
    for module, (i, kind) in names.items():
        layers[i][kind] = adapter.modules[module]
    return layers


def delta_distance(one: Adapter, two: Adapter) -> float:
    """Relative distance ||D1 - D2|| / max(||D1||, ||D2||) of two adapters' weight changes, D = B A."""
    first, second, between = 0.0, 0.0, 0.0
    for module in one.modules.keys() | two.modules.keys():
        pair = [adapter.modules.get(module) for adapter in (one, two)]
        norms = [_inner(f, f) if f else 0.0 for f in pair]
        cross = _inner(*pair) if all(pair) else 0.0
        first, second = first + norms[0], second + norms[1]
        between += norms[0] + norms[1] - 2 * cross
    largest = max(first, second)
    return (max(between, 0.0) / largest) ** 0.5 if largest else 0.0


def _inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """<B1 A1, B2 A2> by r x r products, in fp64 because equal adapters cancel."""
    (a1, b1), (a2, b2) = ((a.double(), b.double()) for a, b in (one, two))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _scale(config: dict, module: str, rank: int) -> float:
    """alpha / r of a module, or alpha / sqrt(r) for rsLoRA; patterns match the end of the name, as in PEFT."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
