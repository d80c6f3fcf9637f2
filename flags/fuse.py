"""Flags of models/llama_moe.py and of models/fuse.py adapters and extract."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from config import flag
from flags.base import (
    OBJECTIVES,
    RAW_MOE,
    BaseModelFlags,
    MachineFlags,
    ModelCommand,
    Planned,
    RunFlags,
    SeedFlags,
    ThreadFlags,
    name_problems,
)

#: Rows of ADAPTER_METHODS (models/adapters/methods.py); a test holds the two together.
ADAPTER_METHODS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots", "tsv",
                   "isotropic", "lego", "random")


@dataclass(frozen=True)
class FuseMoeArgs(ModelCommand):
    """Build the raw fused MoE from trained adapters: one shared FFN plus one low-rank expert per adapter.

    cd models; python llama_moe.py
    """

    heading, general = "Fused MoE", False
    experts: str = flag("helpfulness,safety,truthfulness", "run names or adapter folders, in objective order")
    expert_topk: int = flag(2, "experts per token", low=1)
    router_init: str = flag("random", "random: N(0, router_std); data: class means of each layer's FFN input",
                            choices=("random", "data"))
    router_std: float = flag(0.02, "standard deviation of a random router", low=0)
    router_rows: int = flag(48, "training rows per objective that a data router reads", low=2)
    router_sharpness: float = flag(4.0, "data router: standard deviation of the router logits over tokens", low=0)
    run_name: str = flag(RAW_MOE, "name of the fused model under results/outputs")

    @property
    def expert_names(self) -> tuple[str, ...]:
        return _names(self.experts)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "fuse")

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if len(self.expert_names) < 2:
            found.append(f"--experts {self.experts}: needs two adapters or more, separated by commas")
        if len(set(self.expert_names)) < len(self.expert_names):
            found.append(f"--experts {self.experts}: the same adapter twice; experts must differ")
        elif len({Path(name).name for name in self.expert_names}) < len(self.expert_names):
            found.append(f"--experts {self.experts}: two folders of the same name; experts are named after them")
        order = [OBJECTIVES.index(name) for name in self.expert_names if name in OBJECTIVES]
        if order != sorted(order):
            found.append(f"--experts {self.experts}: needs the order {', '.join(OBJECTIVES)}, because the gating loss "
                         "matches experts and objectives by position")
        if self.expert_topk > len(self.expert_names):
            found.append(f"--expert_topk {self.expert_topk}: there are {len(self.expert_names)} experts; "
                         f"allowed: 1 to {len(self.expert_names)}")
        return found


@dataclass(frozen=True)
class FuseAdaptersArgs(ThreadFlags, SeedFlags, RunFlags, Planned):
    """Fuse LoRA adapters into one on their files alone, without their base model.

    python models/fuse.py adapters --adapters helpfulness,safety,truthfulness --run_name average
    python models/fuse.py adapters --adapters task,safety --weights 0.6,0.4 --method ties --density 0.5 --rank 8
    """

    heading, general = "Fusion of adapters", False
    adapters: str = flag("helpfulness,safety,truthfulness", "run names or adapter folders, separated by commas")
    weights: str = flag("", "a weight for each adapter, separated by commas; empty: equal, summing to 1")
    share: float | None = flag(None, "instead of weights, for two adapters: lambda, 0 to 1, of (1 - lambda) first + "
                                      "lambda second")
    match_norms: str | None = flag(None, "first rescale the others to the first adapter's norm, in all or module by module",
                                   choices=("model", "module"))
    layer_weights: str = flag("", "other weights for some layers: \"0-10:0.7,0.3; 11-31:0.5,0.5\", or a YAML file of such "
                                  "pairs (0-10: [0.7, 0.3])")
    method: str = flag("cat", "cat, svd: the exact weighted sum of the changes B A; linear: that at the inputs' rank; ties, "
                              "dare_*, magnitude_prune, knots: sparse changes; tsv, isotropic: their singular vectors; "
                              "lego: clusters of rank-1 units; random: a control, random directions of the sum's norm",
                       choices=ADAPTER_METHODS)
    rank: int | None = flag(None, "rank of the result; below what the fused change has, it cuts, and the share cut off is "
                                  "printed; empty: the sum of the inputs' ranks, which loses nothing but with --space left "
                                  "or dense, whose entries may fill any rank (linear, lego: the largest of the inputs, "
                                  "which cuts)", low=1)
    energy: float | None = flag(None, "instead of a rank: share of the squared norm that each module keeps, below 1")
    density: float | None = flag(None, "share of the entries that ties, dare, prune and knots keep; tsv: of the directions")
    space: str | None = flag(None, "where entries are trimmed: core (shared principal axes), left (outputs' axes only), "
                                   "dense (raw B A, slow)", choices=("core", "left", "dense"))
    scale: float = flag(1.0, "factor on the fused change")
    compat: str = flag("", "peft: PEFT's combination types on the raw factors, cross terms and all; with --space dense its "
                           "*_svd types", choices=("", "peft"))
    majority_sign_method: str | None = flag(None, "--compat peft, ties: how signs are elected; empty: total",
                                            choices=("total", "frequency"))
    report: bool = flag(True, "write the conflict report: conflicts.json, conflicts.md, conflicts.png")
    run_name: str = flag("average", "name of the fused adapter under results/outputs")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return _names(self.adapters)

    @property
    def adapter_weights(self) -> tuple[float, ...]:
        names = self.adapter_names
        if self.share is not None:
            return (1 - self.share, self.share)
        return tuple(float(w) for w in self.weights.split(",")) if self.weights else (1 / len(names),) * len(names)

    @property
    def weights_by_layer(self) -> dict[int, tuple[float, ...]]:
        """Layer -> weights, for the layers that ``layer_weights`` names; a ValueError says what is wrong with it."""
        return read_layer_weights(self.layer_weights, len(self.adapter_names))

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if len(set(self.adapter_names)) < len(self.adapter_names):
            found.append(f"--adapters {self.adapters}: the same adapter twice; give it once, with more weight")
        if self.share is not None and (self.weights or len(self.adapter_names) != 2):
            found.append(f"--share {self.share}: is for two adapters, in the place of --weights")
        elif self.share is not None and not 0 <= self.share <= 1:
            found.append(f"--share {self.share}: needs a number from 0, the first adapter alone, to 1, the second alone; "
                         f"other sums are given by --weights, e.g. {1 - self.share:g},{self.share:g}")
        if self.match_norms and self.compat:
            found.append(f"--match_norms {self.match_norms}: is not for --compat peft; drop one of the two")
        try:
            if not all(math.isfinite(weight) for weight in self.adapter_weights):
                found.append(f"--weights {self.weights}: every weight must be a finite number")
            if len(self.adapter_weights) != len(self.adapter_names):
                found.append(f"--weights {self.weights}: {len(self.adapter_names)} adapters need as many weights")
        except (ValueError, ZeroDivisionError):
            found.append(f"--weights {self.weights}: needs numbers separated by commas, one per adapter")
        try:
            self.weights_by_layer  # noqa: B018 - reading it is the check
        except ValueError as error:
            found.append(f"--layer_weights {self.layer_weights}: {error}")
        if not math.isfinite(self.scale):
            found.append(f"--scale {self.scale}: must be a finite number")
        if self.density is not None and not 0 < self.density <= 1:
            found.append(f"--density {self.density}: must be above 0 and at most 1")
        if self.rank is not None and self.energy is not None:
            found.append("--rank and --energy: give one of the two")
        return found + _energy_problems(self.energy)


@dataclass(frozen=True)
class ExtractArgs(BaseModelFlags, MachineFlags, SeedFlags, RunFlags, Planned):
    """Extract a LoRA adapter from a full fine-tune: its difference from its base, at a rank or an energy.

    python models/fuse.py extract --model_name_or_path BASE --tuned TUNED --rank 16 --run_name extracted
    """

    heading, general = "Extraction", False
    tuned: str = flag("merged", "the fine-tuned model: a run, a local folder, a hub name; its base is --model_name_or_path")
    rank: int | None = flag(None, "rank of every module; empty, without an energy: 16", low=1)
    energy: float | None = flag(None, "instead of a rank: share of the squared norm of each module's change, below 1")
    ignore_other: bool = flag(False, "leave out what changed but no LoRA can hold (norms, embeddings, biases), instead of "
                                     "refusing")
    run_name: str = flag("extracted", "name of the adapter under results/outputs")

    @property
    def fixed_rank(self) -> int | None:
        """The rank wanted, None when the energy decides."""
        return self.rank if self.rank or self.energy else 16

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if self.dtype != "auto":
            found.append(f"--dtype {self.dtype}: differences are taken in float32; drop it")
        if not self.tuned.strip():
            found.append("--tuned: name the fine-tuned model")
        if self.rank is not None and self.energy is not None:
            found.append("--rank and --energy: give one of the two")
        return found + _energy_problems(self.energy)


def read_layer_weights(text: str, count: int) -> dict[int, tuple[float, ...]]:
    """Layer -> one weight per adapter, from "0-10:0.7,0.3; 11:0.5,0.5" or from a YAML file of such pairs.

    Raises:
        ValueError: not readable, a layer twice, or not ``count`` finite weights.
    """
    if not text.strip():
        return {}
    if text.endswith((".yaml", ".yml")):
        try:
            content = yaml.safe_load(Path(text).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"not readable as YAML ({type(error).__name__})") from None
        if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
            raise ValueError("needs a mapping of layers to lists, e.g. 0-10: [0.7, 0.3]")
        pairs = [(str(layers), weights) for layers, weights in content.items()]
    else:
        pairs = [(layers, weights.split(",")) for layers, _, weights in
                 (part.partition(":") for part in text.split(";") if part.strip())]
    found: dict[int, tuple[float, ...]] = {}
    for layers, given in pairs:
        first, _, last = layers.strip().partition("-")
        try:
            weights = tuple(map(float, given))
            numbers = range(int(first), int(last or first) + 1)
        except (TypeError, ValueError):
            raise ValueError(f"'{layers.strip()}' needs the form 0-10:0.7,0.3 (layers, then a number per adapter)") from None
        if len(weights) != count or not all(map(math.isfinite, weights)):
            raise ValueError(f"layers {layers.strip()}: {count} adapters need as many finite weights")
        if not numbers or not 0 <= numbers[0] <= numbers[-1] < 100_000:
            raise ValueError(f"layers {layers.strip()}: no such range")
        if found.keys() & numbers:
            raise ValueError(f"layer {min(found.keys() & numbers)} stands there twice")
        found.update(dict.fromkeys(numbers, weights))
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _energy_problems(energy: float | None) -> list[str]:
    # the last digits drown in fp32 rounding
    return [] if energy is None or 0 < energy <= 0.9999 else [f"--energy {energy}: must be above 0 and at most 0.9999"]
