"""Fuse LoRA adapters on their files alone. The command behind ``models/fuse.py adapters``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import console
import manifest
from errors import UserError
from flags import FuseAdaptersArgs
from models.adapters.conflict_report import write_report
from models.adapters.conflicts import measure
from models.adapters.files import (
    CONFIG,
    Adapter,
    in_order,
    layer_of,
    read_adapter,
    targets_of,
    vllm_note,
    write_adapter,
)
from models.adapters.methods import ADAPTER_METHODS, PEFT_EQUAL_RANKS, PEFT_METHODS, AdapterMethod
from models.adapters.weights import matched
from models.checkpoints.fingerprints import VERSION, fingerprint, same_base
from models.operators.core_space import cut, project
from models.operators.low_rank import Fused, low_rank, pair_norm
from models.operators.noise import uniform

TRUNCATION = "truncation.json"
_FLAGS = ("rank", "energy", "density", "space", "majority_sign_method")


def fuse_adapters(args: FuseAdaptersArgs) -> str:
    """Read the adapters, report their conflicts, fuse them, write ``results/outputs/RUN``; returns what to say."""
    target = args.results / "outputs" / args.run_name
    row, parameters = choose(args)
    # the weights as read and not the flag, which may name a file that changes
    settings = asdict(args) | {"layer_weights": {str(k): list(v) for k, v in args.weights_by_layer.items()}}
    if not args.overwrite and manifest.finished(target, settings):
        return f"{target}: already fused"
    folders = [Path(n).expanduser() if "/" in n else args.results / "outputs" / n for n in args.adapter_names]
    if target.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--run_name {args.run_name}: {target} is an input of this fusion; choose another name")
    if args.threads:
        torch.set_num_threads(args.threads)
    adapters = _read_all(folders, args.adapter_names)
    base = common_base(adapters)
    check(adapters, args, row)
    factors: dict[str, list[float]] = {}
    if args.match_norms:
        adapters, factors = matched(adapters, args.match_norms)
    with manifest.writing(target, "fuse adapters", settings, overwrite=args.overwrite) as run:
        # before the fusion: the report is about what goes in
        if args.report and len(adapters) > 1:
            write_report(measure(adapters, args.seed), run.folder)
        fused = fuse(adapters, row, parameters, args.adapter_weights, args.weights_by_layer, args.seed, args.scale)
        # of an adapter's configuration only base and task go over; scale and rank are the result's own
        rank = write_adapter(run.folder, {m: f.pair for m, f in fused.items()}, targets_of(adapters), adapters[0].config)
        run.parents.extend(map(str, folders))
        run.inputs.update({adapter.name: adapter.sha256 for adapter in adapters}, **({"base": base} if base else {}))
        if factors:
            run.metrics["norm_factors"] = {name: {"least": min(f), "greatest": max(f)} for name, f in factors.items()}
        run.metrics.update(adapters=len(adapters), rank=rank, modules=len(fused), **truncation(fused, run.folder))
    manifest.register(args.results, {"kind": "run", "command": "fuse adapters", "run": args.run_name, "seed": args.seed,
                                     **run.metrics})
    lost = run.metrics["truncation_error"]
    given = zip(args.adapter_weights, args.adapter_names, strict=True) if args.weights or args.share is not None else ()
    said = " + ".join(f"{weight:.4g} {name}" for weight, name in given)
    return (f"{target}: {len(adapters)} adapters, {args.method}, rank {rank}" + (f", {said}" if said else "")
            + (f", {lost:.2%} of the norm cut off (worst: {run.metrics['worst_module']}, "
               f"{run.metrics['worst_error']:.2%}; all in {TRUNCATION})" if lost > 1e-6 else "") + vllm_note(rank))


def choose(args: FuseAdaptersArgs) -> tuple[AdapterMethod, Any]:
    """The method that the flags name, with its parameters.

    Raises:
        UserError: flags that it does not take, or needs and has not; all at once.
    """
    problems: list[str] = []
    given = {name: getattr(args, name) for name in _FLAGS}
    row: AdapterMethod | None
    if not args.compat:
        name, row = args.method, ADAPTER_METHODS[args.method]
    else:
        # PEFT's svd works on dense changes anyway
        dense = given.pop("space") == "dense" and args.method != "svd"
        name = args.method + ("_svd" if dense else "")
        row = PEFT_METHODS.get(name)
        if row is None:
            raise UserError(f"--method {args.method}{' --space dense' if dense else ''}: PEFT has no such combination type; "
                            f"its types: {', '.join(PEFT_METHODS)} (the part _svd stands for --space dense)")
        if args.space not in (None, "dense"):
            problems.append(f"--space {args.space}: PEFT works on factors (empty) or on dense changes (dense)")
    parameters = row.configured(name, given, problems)
    if problems:
        raise UserError(*problems)
    return row, parameters


def fuse(adapters: Sequence[Adapter], row: AdapterMethod, parameters: Any, weights: Sequence[float],
         by_layer: Mapping[int, Sequence[float]], seed: int, scale: float = 1.0) -> dict[str, Fused]:
    """Fuse module by module; one that only some adapters train gets their part alone.

    Args:
        weights: one per adapter.
        by_layer: other weights for the modules of some decoder layers.
        scale: factor on the fused change.
    """
    if row in PEFT_METHODS.values() and getattr(parameters, "rank", 0) is None:
        # PEFT takes one rank for all modules, the largest anywhere
        parameters = replace(parameters, rank=max(a.shape[0] for adapter in adapters for a, _ in adapter.modules.values()))
    function = row.load()
    fused: dict[str, Fused] = {}
    for module in tqdm(in_order(adapters), "fuse", disable=console.hidden() or None):
        layer = layer_of(module)
        shares = weights if layer is None else by_layer.get(layer, weights)
        # an adapter that does not train the module changes it by zero, and zeros have no vote in TIES
        there = [(adapter, w) for adapter, w in zip(adapters, shares, strict=True) if module in adapter.modules]
        members, own = zip(*there, strict=True)
        try:
            change = _fuse_module(function, row, module, members, own, parameters, partial(_draw, seed, module))
        except ValueError as error:
            raise UserError(f"--method: {module}: {error}") from None
        a, b = change.pair
        fused[module] = replace(change, pair=(a, b * scale), norm=change.norm * abs(scale))
    return fused


def _fuse_module(function: Callable, row: AdapterMethod, module: str, adapters: Sequence[Adapter], weights: Sequence[float],
                 parameters: Any, draw: Callable) -> Fused:
    pairs = [adapter.modules[module] for adapter in adapters]
    if row.on == "factors":
        scales = [adapter.scales[module] for adapter in adapters]
        # PEFT weighs with the scale and sparsifies without it: the scale moves from B to the weight
        pairs = [(a, b / s) for (a, b), s in zip(pairs, scales, strict=True)]
        weights = [w * s for w, s in zip(weights, scales, strict=True)]
    if row.on != "tasks":
        # what gives factors cuts nothing off that it could report: cat is exact, the others define their result
        pair = function(pairs, weights, parameters, draw)
        return Fused(pair, pair_norm(pair), 0.0)
    core = project(pairs, getattr(parameters, "space", row.space))
    merged = function(core.tasks, weights, parameters, draw)
    # the sum of the ranks holds every sum of the changes without loss
    ranks = [a.shape[0] for a, _ in pairs]
    rank, energy = parameters.rank or (max(ranks) if row.largest else sum(ranks)), getattr(parameters, "energy", None)
    return low_rank(merged, rank, energy) if core.left is None else cut(core, merged, rank, energy)


def _draw(seed: int, module: str, which: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers that depend on seed, module, adapter and place alone: not on which modules came before."""
    return uniform(seed, module, which, 0, prod(shape)).view(shape)


def _read_all(folders: Sequence[Path], names: Sequence[str]) -> list[Adapter]:
    adapters: list[Adapter] = []
    problems: list[str] = []
    for folder, name in zip(folders, names, strict=True):
        try:
            adapters.append(read_adapter(folder, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return adapters


def common_base(adapters: Sequence[Adapter]) -> str | None:
    """The fingerprint of the base that all were trained on, None where no run folder tells it.

    Raises:
        UserError: they were trained on different bases, by fingerprint or else by name.
    """
    recorded: dict[str, str | None] = {}
    names: dict[str, str] = {}
    for adapter in adapters:
        there = (adapter.folder / manifest.MANIFEST).is_file()
        recorded[adapter.name] = manifest.read(adapter.folder).get("inputs", {}).get("base") if there else None
        names[adapter.name] = str(adapter.config.get("base_model_name_or_path") or "")
    prints = {name: value for name, value in recorded.items() if value is not None}
    # fingerprints where all have one; names are what adapters from elsewhere have
    if len(prints) == len(recorded):
        # adapters of an earlier version recorded the base in that version's way: only the base itself can tell
        named = next((folder for name in names.values() if (folder := Path(name)).is_dir()), None)
        if len({value.startswith(VERSION) for value in prints.values()}) > 1 and named:
            prints = {name: fingerprint(named) if same_base(value, named) else value for name, value in prints.items()}
        if len(set(prints.values())) > 1:
            short = _listed({name: base[:12] for name, base in prints.items()})
            raise UserError(f"--adapters: they were trained on different bases ({short}); fuse those of one base")
    elif len({Path(name).name for name in names.values()}) > 1:
        raise UserError(f"--adapters: they name different bases ({_listed(names)}); fuse those of one base, or, if it is "
                        f"one base under several names, write one into base_model_name_or_path of each {CONFIG}")
    return next((base for base in prints.values() if base), None)


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value or 'none'}" for name, value in values.items())


def check(adapters: Sequence[Adapter], args: FuseAdaptersArgs, row: AdapterMethod) -> None:
    """Refuse, all at once: shapes that differ, transposed layers, layers that nobody has, ranks that cannot be added up."""
    problems: list[str] = []
    shapes: dict[str, dict[str, tuple[int, int]]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for module, (a, b) in adapter.modules.items():
            shapes.setdefault(module, {})[adapter.name] = (b.shape[0], a.shape[1])
            ranks.setdefault(module, {})[adapter.name] = a.shape[0]
    odd = [module for module, own in shapes.items() if len(set(own.values())) > 1]
    if odd:
        problems.append(f"--adapters: {len(odd)} modules have other shapes in other adapters (e.g. {odd[0]}: "
                        f"{_listed({k: str(v) for k, v in shapes[odd[0]].items()})}); they belong to different bases")
    if len({bool(adapter.config.get("fan_in_fan_out")) for adapter in adapters}) > 1:
        problems.append(f"--adapters: fan_in_fan_out differs in their {CONFIG}; fuse adapters of one base")
    layers = {layer for module in shapes if (layer := layer_of(module)) is not None}
    if absent := sorted(args.weights_by_layer.keys() - layers):
        problems.append(f"--layer_weights: no adapter trains layer {', '.join(map(str, absent))}; allowed: "
                        f"{', '.join(map(str, sorted(layers))) or 'none, no module has a layer number'}")
    unequal = [module for module, own in ranks.items() if len(set(own.values())) > 1]
    if args.compat and row in [PEFT_METHODS[name] for name in PEFT_EQUAL_RANKS] and unequal:
        problems.append(f"--compat peft --method {args.method}: adds factors up, so ranks must be equal ("
                        f"{unequal[0]}: {_listed({k: str(v) for k, v in ranks[unequal[0]].items()})}); use cat or svd, or "
                        "leave --compat away")
    if problems:
        raise UserError(*problems)


def truncation(fused: Mapping[str, Fused], folder: Path) -> dict[str, Any]:
    """Write what was cut off of each module; returns the sum over modules and the worst."""
    rows = [{"module": m, "rank": f.pair[0].shape[0], "norm": f.norm, "error": f.error} for m, f in fused.items()]
    manifest.write_json(folder / TRUNCATION, rows)
    # squares add up over modules, relative errors do not
    whole = sum(f.norm**2 for f in fused.values())
    lost = sum((f.norm * f.error) ** 2 for f in fused.values())
    worst = max(rows, key=lambda r: r["error"])
    return {"truncation_error": (lost / whole) ** 0.5 if whole else 0.0, "worst_module": worst["module"],
            "worst_error": worst["error"]}
