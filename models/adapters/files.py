"""LoRA adapters as files: read, checked, compared, written. Works on the adapter alone, without its base model."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError, nearest_place
from flags.base import TASKS
from manifest import sha256, write_json
from models.base.families import Family
from models.base.folders import POINTER_ADVICE, is_pointer
from models.operators.low_rank import Pair, inner

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: The largest rank that vLLM serves, and the ranks that its --max-lora-rank takes (vllm/config/lora.py).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: PEFT's names of the two factors; anything else in the file is part of the change and not of the sum.
#: ``state_dict()`` puts the adapter's name in between (lora_A.default.weight), ``save_pretrained`` does not.
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<name>[^.]+))?\.weight$")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
#: What a weighted sum of B A cannot hold: (pattern of a tensor's name, what it is).
_FOREIGN = (
    (r"lora_magnitude_vector", "a DoRA magnitude"),
    (r"lora_embedding_[AB]", "a LoRA on an embedding"),
    (r"lora_[AB]\.bias$|\.bias$", "a trained bias"),
    (r"modules_to_save", "a module trained in full (modules_to_save)"),
    (r"(embed_tokens|embed_in|embed_out|lm_head|wte)(\.base_layer)?\.weight$",
     "a copy of an embedding; save the adapter with save_embedding_layers=False where its rows are the base's; where the "
     "vocabulary was resized, merge it into a full model by PEFT's merge_and_unload and give that"),
    (r"lora_[AB]\.(\w+\.)?weight$", "a LoRA factor under a name without PEFT's base_model.model. in front"),
)
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
            "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config")
#: Types of models whose layers, all but the head, keep their weights as (in, out).
_IN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: Initialisations that take B A out of the base's weights: the factors are not the whole change.
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module name -> (A (r, in), B (out, r) with the scale applied), fp32.

    Args:
        name: for messages.
        folder: where it was read from.
        config: its ``adapter_config.json``.
        modules: module name without PEFT's prefix -> factors.
        scales: the scale that was applied to each module's B.
    """

    name: str
    folder: Path
    config: dict
    modules: dict[str, Pair]
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return sha256(self.folder / WEIGHTS)


def read_adapter(folder: Path, name: str | None = None, scaled: bool = True) -> Adapter:
    """Read a PEFT LoRA adapter, applying each module's own scale (alpha patterns, rank patterns, rsLoRA).

    Args:
        scaled: multiply the scale into B; else B is as in the file, and ``scales`` says what is to be applied.

    Raises:
        UserError: no adapter there, damaged file, or anything that is not a LoRA pair (DoRA, trained biases, modules
            trained in full, embeddings), each by name.
    """
    name = name or folder.name
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing == [WEIGHTS] and (pickled := pickled_advice(folder)):
        raise UserError(f"adapter '{name}': {pickled}")
    if missing:
        # a task's own run is called after it
        flag = "--task_name" if name in TASKS else "--run_name"
        raise UserError(f"adapter '{name}': {', '.join(missing)} not in {folder}{nearest_place(folder)}; name a run or a "
                        f"folder that has them, or train it: align_basemodel.py --moe_flag 0 {flag} {name}")
    config = _read_config(folder / CONFIG)
    if is_pointer(folder / WEIGHTS):
        raise UserError(f"{folder / WEIGHTS}: {POINTER_ADVICE}")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({error}); train the adapter again") from None
    matches = {key: match for key in tensors if (match := _KEY.match(key))}
    if foreign := [key for key in tensors if key not in matches]:
        raise UserError(f"{folder / WEIGHTS}: {_described(foreign)}; only lora_A and lora_B weights can be fused")
    if len(names := sorted({match["name"] or "" for match in matches.values()})) > 1:
        raise UserError(f"{folder / WEIGHTS}: holds the factors of several adapters ({', '.join(map(repr, names))}); save "
                        "one of them with PeftModel.save_pretrained(.., selected_adapters=[NAME])")
    # get_peft_model on a model that is wrapped already: nothing that loads it finds such a module
    if nested := sorted(key for key, match in matches.items() if match["module"].startswith("base_model.model.")):
        raise UserError(f"{folder / WEIGHTS}: {len(nested)} keys are nested, e.g. '{nested[0]}' (the base has modules like "
                        f"'{matches[nested[0]]['module'].removeprefix('base_model.model.')}'): the model was wrapped by "
                        "PEFT twice; save it from one wrapper with PeftModel.save_pretrained, or rename the keys")
    # their numbers are codes that want a scale
    if codes := sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point()):
        raise UserError(f"{folder / WEIGHTS}: {len(codes)} factors are no floating-point numbers, e.g. '{codes[0]}' is "
                        f"{tensors[codes[0]].dtype}; give the adapter as PeftModel.save_pretrained wrote it")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        # fp32 from here on: sums of 16-bit factors would round at every step
        halves.setdefault(match["module"], {})[match["part"]] = tensors[key].float()
    problems = [f"{folder / WEIGHTS}: {module}: {fault}" for module, factors in halves.items() if (fault := _fault(factors))]
    if not halves:
        problems.append(f"{folder / WEIGHTS}: holds no tensors; train the adapter again")
    problems += [f"{folder / WEIGHTS}: {module}: has rank {rank}, {CONFIG} says {want}, and the scale depends on it; give "
                 f"the {CONFIG} that was saved with it" for module, factors in halves.items() if not problems
                 if (rank := factors["A"].shape[0]) != (want := _rank(config, module, rank))]
    if problems:
        raise UserError(*problems)
    scales = {m: _scale(config, m, p["A"].shape[0]) for m, p in sorted(halves.items())}
    # the scale goes into B once, so that everything after this file may forget about alpha and r
    modules = {m: (halves[m]["A"], halves[m]["B"] * scale if scaled else halves[m]["B"]) for m, scale in scales.items()}
    return Adapter(name, folder, config, modules, scales)


def pickled_advice(folder: Path) -> str:
    """What to do about an adapter that is there as a pickle only; empty where it is not."""
    pickled = [path.name for path in sorted(folder.glob("adapter_model.*")) if path.suffix in (".bin", ".pt", ".pth")]
    if not pickled:
        return ""
    return (f"{folder} holds {pickled[0]} only: a pickle may run code when it is read and is refused; convert it where that "
            f"does no harm: PeftModel.from_pretrained(BASE, {str(folder)!r}).save_pretrained({str(folder)!r}) writes "
            f"{WEIGHTS}")


def _read_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json``; a UserError for everything in it that keeps the adapter from being a sum of B A."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); train the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a JSON object; train the adapter again")
    problems = []
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"{path}: peft_type is {config['peft_type']}, only LORA adapters can be fused")
    problems += [f"{path}: {option} is set; a low-rank expert cannot hold it; train without it" for option in _REFUSED
                 if config.get(option)]
    if config.get("bias", "none") != "none":
        problems.append(f"{path}: bias is {config['bias']!r}: trained biases cannot be fused; train with bias='none'")
    # their B A is the adapter's difference from a changed base, which is nowhere in the folder
    if str(config.get("init_lora_weights")).startswith(_MUTATING):
        problems.append(f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base too; save it "
                        "again with path_initial_model_for_weight_conversion, which makes it a plain LoRA, or train again")
    patterns = config.get("alpha_pattern") or {}
    # JSON holds true and NaN where a number should be; either would pass a plain comparison
    alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a) and a for a in alphas):
        problems.append(f"{path}: lora_alpha and the values of alpha_pattern must be numbers other than 0")
    problems += [f"{path}: {problem}" for problem in _malformed(config)]
    if problems:
        raise UserError(*problems)
    return config


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """Settings of another type than PEFT writes: it would take a text for true, or end in a traceback."""
    problems = [f"{key} is {config[key]!r}, allowed are true and false" for key in ("use_rslora", "fan_in_fan_out")
                if not isinstance(config.get(key), bool | None)]
    ranks = config.get("rank_pattern") or {}
    whole = [config.get("r", 1), *(ranks.values() if isinstance(ranks, dict) else [None])]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in whole):
        problems.append("r and the values of rank_pattern must be whole numbers from 1 on")
    patterns = {key: list(value) for key in ("alpha_pattern", "rank_pattern") if isinstance(value := config.get(key), dict)}
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key)
        if isinstance(names, str) and names != "all-linear":
            patterns[key] = [names]
        elif not isinstance(names, str | None) and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            problems.append(f"{key} must be a list of names, or one regular expression")
    layers = config.get("layers_to_transform")
    if not all(isinstance(layer, int | None) and not isinstance(layer, bool)
               for layer in (layers if isinstance(layers, list) else [layers])):
        problems.append("layers_to_transform must be a whole number or a list of them")
    for key, expressions in patterns.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error:
                problems.append(f"{key} {expression!r} is not a regular expression")
    return problems


def transposed(config: Mapping[str, Any], base: Mapping[str, Any], module: str) -> bool:
    """Whether the base keeps a module's weight as (in, out), for readers of files.

    PEFT asks the layer (GPT-2's Conv1D) and corrects ``fan_in_fan_out``; a file has no layers, but names its type.

    Args:
        config: of the adapter.
        base: config.json of its base; without a model_type the adapter is believed.
    """
    kind = base.get("model_type")
    return kind in _IN_OUT and not module.endswith("lm_head") if kind else bool(config.get("fan_in_fan_out"))


def _described(foreign: Sequence[str]) -> str:
    """The tensors that do not belong, by kind: the first of each."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(foreign):
        kind = next((what for pattern, what in _FOREIGN if re.search(pattern, key)), "not a LoRA factor")
        kinds.setdefault(kind, []).append(key)
    return "; ".join(f"tensor '{keys[0]}'{f' and {len(keys) - 1} more' if keys[1:] else ''} is {what}"
                     for what, keys in kinds.items())


def _fault(factors: dict[str, Tensor]) -> str | None:
    """What is wrong with a module's pair, None when nothing is."""
    if set(factors) != {"A", "B"} or any(factor.dim() != 2 for factor in factors.values()) or \
            factors["A"].shape[0] != factors["B"].shape[1] or not all(factor.numel() for factor in factors.values()):
        return "lora_A and lora_B do not form a pair"
    if not all(torch.isfinite(factor).all() for factor in factors.values()):
        return "holds NaN or infinity; train the adapter again"
    return None


def _scale(config: dict, module: str, rank: int) -> float:
    """alpha / r of a module, or alpha / sqrt(r) for rsLoRA; patterns match the end of the name, as in PEFT."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # the first pattern that fits, as PEFT takes it: their order in the file counts
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _rank(config: dict, module: str, rank: int) -> int:
    """The rank that the configuration gives a module, ``rank`` where it gives none."""
    patterns = config.get("rank_pattern") or {}
    fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fitting, config.get("r") or rank)


def write_adapter(folder: Path, modules: Mapping[str, Pair], targets: Iterable[str], origin: Mapping[str, Any]) -> int:
    """Write factors as a PEFT adapter of scale 1 (alpha = r everywhere), for PEFT and vLLM.

    Ranks may differ: ``r`` is the largest, patterns hold the others. Of ``origin`` (a configuration) only the base and
    the task are taken over: copied flags such as use_rslora would change what the factors mean.

    Returns:
        the largest rank.
    """
    ranks = {module: a.shape[0] for module, (a, _) in modules.items()}
    # as r, for servers size their buffers by it: vLLM compares it with --max-lora-rank
    largest = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": origin.get("task_type"), "inference_mode": True, "bias": "none",
        "base_model_name_or_path": origin.get("base_model_name_or_path"), "revision": origin.get("revision"),
        "fan_in_fan_out": bool(origin.get("fan_in_fan_out")), "r": largest, "lora_alpha": largest, "lora_dropout": 0.0,
        "rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(targets), "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "init_lora_weights": True,
    })
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return largest


def layer_of(module: str) -> int | None:
    """The number of the decoder layer that a module belongs to: the first number in its name; None without one."""
    number = _LAYER.search(module)
    return int(number[1]) if number else None


def in_order(adapters: Iterable[Adapter]) -> list[str]:
    """Every module that any of the adapters trains, by layer number, then by name."""
    modules = set().union(*(adapter.modules for adapter in adapters))
    return sorted(modules, key=lambda module: (layer_of(module) is None, layer_of(module), module))


def vllm_note(rank: int) -> str:
    """What vLLM needs to be told to serve an adapter of this rank; empty at its default of 16."""
    # vLLM's flag takes the ranks of its list only, is 16 unless given, and refuses every adapter above it
    fitting = [r for r in VLLM_RANKS if r >= rank]
    if not fitting:
        return f"; vLLM serves ranks up to {VLLM_RANKS[-1]}: give a smaller --rank to serve it there"
    return f"; vLLM serves it with --max-lora-rank {fitting[0]}" if rank > 16 else ""


def complete_targets(modules: Iterable[str], known: Iterable[str]) -> set[str]:
    """What to write as ``target_modules``: last parts of names, or whole names where a part would match too much.

    Args:
        modules: those that the adapter holds.
        known: every module of the base that could be meant.
    """
    wanted, there = (Counter(name.rpartition(".")[2] for name in set(names)) for names in (modules, known))
    return {last if wanted[last] == there[last] else name for name in modules for last in [name.rpartition(".")[2]]}


def targets_of(adapters: Sequence[Adapter]) -> set[str]:
    """``target_modules`` for what any of the adapters trains.

    Their own lists where these are plain; whole names where one picks layers or uses an expression, because the lists
    alone would match modules that none of them trains.
    """
    lists = [adapter.config.get("target_modules") for adapter in adapters]
    picky = ("layers_to_transform", "layers_pattern", "exclude_modules")
    # target_modules may be a regular expression (text), or be narrowed by layers: then names must be whole
    plain = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
    if plain and not any(adapter.config.get(key) for adapter in adapters for key in picky):
        return set().union(*(names or () for names in lists))
    return set().union(*(adapter.modules for adapter in adapters))


def ffn_factors(adapter: Adapter, family: Family, num_layers: int) -> list[dict[str, Pair]]:
    """An adapter's factors by layer and projection ("gate", "up", "down").

    Raises:
        UserError: it touches anything but the FFN (attention, norms, embeddings), or leaves a projection out.
    """
    ffns = [f"{family.layers}.{i}.{family.ffn}" for i in range(num_layers)]
    names = [f"{ffn}.{projection}" for ffn in ffns for projection in family.projections]
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

    def halves(pair: Pair) -> tuple[Pair, Pair]:
        # gate and up of one matrix: what reads the input is common, rows of what writes are gate's first
        a, b = pair
        return (a, b[: len(b) // 2]), (a, b[len(b) // 2 :])

    def of(ffn: str, name: str) -> Pair:
        return adapter.modules[f"{ffn}.{name}"]

    return [dict(zip(("gate", "up", "down"), family.ffn_parts(partial(of, ffn), halves), strict=True)) for ffn in ffns]


def delta_distance(one: Adapter, two: Adapter) -> float:
    """Relative distance ||D1 - D2|| / max(||D1||, ||D2||) of two adapters' weight changes, D = B A."""
    first, second, between = 0.0, 0.0, 0.0
    for module in one.modules.keys() | two.modules.keys():
        mine, its = one.modules.get(module), two.modules.get(module)
        norms = [inner(pair, pair) if pair else 0.0 for pair in (mine, its)]
        cross = inner(mine, its) if mine and its else 0.0
        first, second = first + norms[0], second + norms[1]
        # ||D1 - D2||^2 by inner products of factors, added up over modules: no dense matrix
        between += norms[0] + norms[1] - 2 * cross
    largest = max(first, second)
    return (max(between, 0.0) / largest) ** 0.5 if largest else 0.0
