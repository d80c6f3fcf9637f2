"""Build the raw fused MoE: one shared base, one low-rank expert per aligned model, a router per layer.

    cd models; python llama_moe.py
    python models/llama_moe.py --experts helpfulness,safety,truthfulness --router_init data

Expert i is W + (alpha / r) B_i A_i of adapter i on its own base, never a dense copy. Adapters of another base, adapters
that train anything but the FFN, and experts that turn out to be the same are refused (spec sections 4.2 and 10.1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import console
import manifest
import runtime
from errors import UserError, exit_on_user_error
from flags import RAW_MOE, FuseMoeArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from torch import Tensor

    from models.adapters.files import Adapter
    from models.base.families import Family

log = logging.getLogger(__name__)
#: Experts nearer than this (relative to their own size) are the same expert.
_SAME = 1e-4
#: A router from data reads samples cut at so many tokens, so many at a time: a mean needs neither long ones nor speed.
_LONGEST, _BATCH = 256, 8


def stack_experts(adapters: Sequence[Adapter], family: Family, num_layers: int
                  ) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Factors of all experts by layer and projection: a (experts, r, in), b (experts, out, r).

    Ranks may differ; smaller ones are padded with zeros, which changes nothing.
    """
    import torch
    from torch.nn.functional import pad

    from models.adapters.files import ffn_factors

    per_expert = [ffn_factors(adapter, family, num_layers) for adapter in adapters]
    layers = []
    for layer in range(num_layers):
        stacked = {}
        for projection in ("gate", "up", "down"):
            pairs = [factors[layer][projection] for factors in per_expert]
            rank = max(a.shape[0] for a, _ in pairs)
            # pad counts from the last dimension: rows of A (r, in) are the second pair, columns of B (out, r) the first
            stacked[projection] = (torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs]),
                                   torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in pairs]))
        layers.append(stacked)
    return layers


def refuse_equal_experts(adapters: Sequence[Adapter]) -> None:
    """A UserError for two adapters with the same weight change: a MoE of equal experts routes nothing."""
    from models.adapters.files import delta_distance

    same = [(a, b) for a, b in combinations(adapters, 2) if delta_distance(a, b) < _SAME]
    if same:
        raise UserError(*(f"--experts: '{a.name}' ({a.folder}) and '{b.name}' ({b.folder}) are the same weights; "
                          "train them on different objectives" for a, b in same))


def data_routers(model: Any, tokenizer: Any, args: FuseMoeArgs, device: Any) -> list[Tensor]:
    """A router (experts, hidden) per layer from the FFN inputs of each objective's prompts and answers (spec section 9.7.3).

    Raises:
        UserError: experts that do not match the known objectives one to one.
    """
    import torch

    from models.base.families import decoder_layers, family_of
    from models.moe.input_statistics import InputStatistics, recorded_inputs

    objectives = _objectives_of(args)
    family = family_of(model.config)
    ffns = [getattr(layer, family.ffn) for layer in decoder_layers(model, family)]
    statistics = InputStatistics(len(ffns), len(objectives), model.config.hidden_size)
    with recorded_inputs(ffns) as inputs, torch.no_grad():
        for place, objective in enumerate(objectives):
            for batch in _batches_of(objective, tokenizer, args):
                mask = batch["attention_mask"].to(device)
                # the body alone: FFN inputs need no logits over the vocabulary
                model.model(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
                statistics.add(place, [inputs[layer] for layer in range(len(ffns))], mask)
    return statistics.routers(args.router_sharpness)


def _objectives_of(args: FuseMoeArgs) -> list[str]:
    """The objective whose data each expert reads: the one it is named after, else the one at its place."""
    from data.records import OBJECTIVES

    objectives = [name if name in OBJECTIVES else OBJECTIVES[place] if place < len(OBJECTIVES) else ""
                  for place, name in enumerate(args.expert_names)]
    if "" in objectives or len(set(objectives)) < len(objectives):
        raise UserError(f"--router_init data: knows the objectives {', '.join(OBJECTIVES)}, which do not match "
                        f"--experts {args.experts} one to one; use --router_init random")
    return objectives


def _batches_of(objective: str, tokenizer: Any, args: FuseMoeArgs) -> Iterator[dict[str, Tensor]]:
    """Padded batches of --router_rows training samples of an objective, drawn by the seed."""
    import torch

    from data.collate import pad_rows
    from data.encode import encode
    from data.prompts import template
    from data.sources import load_records

    records = load_records(objective, "train")
    # the same seed for every objective, so that one's sample does not depend on which others there are
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(args.seed))[: args.router_rows].tolist()
    rows = encode([records[place] for place in order], tokenizer, template(args.template, tokenizer), _LONGEST).rows
    for start in range(0, len(rows), _BATCH):
        yield pad_rows(rows[start : start + _BATCH], tokenizer.pad_token_id)


def build(args: FuseMoeArgs, run: manifest.Run) -> None:
    """Read, check and fuse the adapters; write the raw MoE into the run folder."""
    import torch

    from models.adapters.files import read_adapter
    from models.base.families import family_of
    from models.base.loading import base_path, check_base, load_base, load_tokenizer
    from models.base.placement import set_up_torch
    from models.moe.files import MoeConfig, install, save_moe
    from models.moe.router import random_router

    # a path needs its slash: a folder that happens to be called as a run is not meant
    folders = [Path(n) if Path(n).is_dir() and "/" in n else args.results / "outputs" / n for n in args.expert_names]
    adapters = [read_adapter(folder, name) for folder, name in zip(folders, args.expert_names, strict=True)]
    base = base_path(args.model_name_or_path, args.cache_dir)
    # cheap refusals first: none of them needs the base's weights
    base_hash = [check_base(folder, base) for folder in folders][0]
    refuse_equal_experts(adapters)
    device, dtype = set_up_torch(args)
    tokenizer = load_tokenizer(base)
    model = load_base(base, dtype, device)
    family = family_of(model.config)
    factors = stack_experts(adapters, family, model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(args.seed)
    if args.router_init == "data":
        routers = data_routers(model, tokenizer, args, device)
    else:
        routers = [random_router(len(adapters), model.config.hidden_size, args.router_std, generator) for _ in factors]
    install(model, factors, routers, args.expert_topk)
    names = tuple(Path(name).name for name in args.expert_names)
    sources = {name: adapter.sha256 for name, adapter in zip(names, adapters, strict=True)}
    save_moe(run.folder, model, MoeConfig(names, args.expert_topk, args.model_name_or_path, base_hash, sources))
    tokenizer.save_pretrained(run.folder)
    run.parents.extend(map(str, folders))
    run.inputs.update(base=base_hash, **sources)
    # a model's expert factors are buffers, so that its parameters are the base and the routers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expert_parameters = sum(factor.numel() for layer in factors for pair in layer.values() for factor in pair)
    run.metrics.update(experts=len(names), rank=factors[0]["gate"][0].shape[1], parameters=parameters,
                       expert_parameters=expert_parameters)


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(FuseMoeArgs, argv)
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        args = parsed.args
        target, settings = args.results / "outputs" / args.run_name, asdict(args)
        if not args.overwrite and manifest.finished(target, settings):
            console.show(f"{target}: already built", str(target))
            return
        with manifest.writing(target, "llama_moe", settings, overwrite=args.overwrite) as run:
            build(args, run)
        manifest.register(args.results, {"kind": "run", "command": "llama_moe", "run": args.run_name, **run.metrics})
        console.show(_last_screen(parsed, run.metrics, target), str(target))


def _last_screen(parsed: config.Parsed, metrics: dict[str, Any], target: Path) -> str:
    args, made = parsed.args, manifest.read(target)
    raw = [] if args.run_name == RAW_MOE else ["--raw_moe", args.run_name]
    head = f"{args.run_name}: {metrics['experts']} experts of rank {metrics['rank']} on one shared base"
    return console.last_screen(head, {
        "experts": ", ".join(Path(name).name for name in args.expert_names),
        "numbers": f"{metrics['parameters']:,} of base and routers, {metrics['expert_parameters']:,} of experts",
        "took": console.cost(made["seconds"], made["peak_memory_mb"]),
        "lies in": str(target),
        "next": console.following(["align_basemodel.py", "--moe_flag", "1", *raw, *console.same(
            parsed, "model_name_or_path", "output_dir", "cache_dir", "template")])})


if __name__ == "__main__":
    main()
