"""Realign tuned models on their aligned one. The command behind ``models/fuse.py realign``."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import manifest
from errors import UserError
from flags.realign import RealignArgs
from models.adapters.files import CONFIG, WEIGHTS, vllm_note, write_adapter
from models.adapters.fuse import TRUNCATION, truncation
from models.base.families import family_of
from models.base.placement import set_up_torch
from models.checkpoints.configs import section, written
from models.checkpoints.fingerprints import fingerprint
from models.checkpoints.header import KINDS
from models.checkpoints.reader import INDEX
from models.checkpoints.writer import Writer, plan_layout
from models.merging.merge import COMPANIONS, DTYPES
from models.operators.low_rank import Fused, Pair, low_rank, pair_norm
from models.realign.masks import open_masked
from models.realign.methods import METHODS, RULES, parameter_help
from models.realign.walk import Change, Inputs, Realignment, changes
from models.task_vectors import FLOATS, Model, misfits, open_model, provenance, raw

DETAILS = "realign.json"


def realign(args: RealignArgs) -> str:
    """Check every input, realign weight by weight, write ``results/outputs/RUN``; returns what to say.

    Raises:
        UserError: flags that do not fit, inputs that are missing, damaged, or tuned from another base; all at once.
    """
    if args.parameters.strip() == "help":
        return parameter_help()
    realignment = realignment_of(args)
    target = args.results / "outputs" / args.run_name
    with ExitStack() as stack:
        masked = open_masked(args, stack) if args.mask else None
        inputs = masked.inputs if masked else open_inputs(args, stack)
        hashes = hashes_of(inputs) | ({"mask": masked.sha256} if masked else {})
        # by content: the same run name over retrained tasks is another realignment
        settings = asdict(args) | {"inputs": hashes}
        if target.resolve() in [model.folder for model in (inputs.aligned, *inputs.others)]:
            raise UserError(f"--run_name {args.run_name}: {target} is an input; choose another name")
        if not args.overwrite and manifest.finished(target, settings):
            return f"{target}: already realigned"
        # a mask on the factors themselves leaves a LoRA: no SVD, no error
        exact = masked.adapter() if masked and args.output == "adapter" and not args.rank else None
        rank = 0 if exact else rank_of(inputs, realignment, args)
        set_up_torch(args)
        with manifest.writing(target, "realign", settings, overwrite=args.overwrite) as run:
            summary = Summary()
            # one weight at a time from here to the file; nothing has been computed yet
            stream = summary.over(masked.changes() if masked else changes(inputs, realignment))
            if args.output == "dense":
                said = write_dense(stream, inputs.aligned, args, run)
            else:
                said = write_low_rank(stream, inputs, rank, exact, args, run)
            manifest.write_json(run.folder / DETAILS, summary.rows)
            run.parents.extend(str(model.folder) for model in (inputs.aligned, *inputs.others))
            run.parents.extend([str(masked.folder)] if masked else [])
            run.inputs.update(hashes)
            run.metrics.update(method=args.method, rule=args.rule, tasks=[task.name for task in inputs.tasks],
                               **({"readout": str(masked.readout), "mask": args.mask} if masked else {}),
                               **summary.metrics())
    manifest.register(args.results, {"kind": "run", "command": "realign", "run": args.run_name, "seed": args.seed,
                                     **run.metrics})
    return f"{target}: {args.method}{f' + {args.rule}' if args.rule else ''}, {summary.said()}{said}"


def realignment_of(args: RealignArgs) -> Realignment:
    """Method, rule and their parameters from the flags; a UserError with everything that is wrong with them."""
    problems: list[str] = []
    method, rule = METHODS[args.method], RULES[args.rule]
    parameters = method.configured(args.parameters, "--parameters", problems)
    rule_parameters = rule.configured(args.rule_parameters, "--rule_parameters", problems)
    if problems:
        raise UserError(*problems)
    return Realignment(method, parameters, rule, rule_parameters, args.seed)


def open_inputs(args: RealignArgs, stack: ExitStack) -> Inputs:
    """Every model that the flags name, opened and checked against the aligned one."""
    problems: list[str] = []
    # first and alone: every other model is read on its checkpoint and compared with it
    aligned = open_model(args.aligned or args.model_name_or_path, args,
                         "--aligned" if args.aligned else "--model_name_or_path", stack)

    named: list[tuple[Model, str]] = []

    def opened(name: str, flag: str, tuned: bool) -> Model | None:
        try:
            model = open_model(name, args, flag, stack, aligned.checkpoint)
        except UserError as error:
            problems.extend(error.problems)
            return None
        named.append((model, flag))
        # the unaligned and the safe model lie elsewhere by intention: only tasks must come from the aligned one
        if tuned:
            problems.extend(provenance(model, aligned, flag, args.trust_base))
        return model

    tasks = tuple(task for name in args.task_names if (task := opened(name, "--tasks", tuned=True)))
    unaligned = opened(args.unaligned, "--unaligned", tuned=False) if args.unaligned else None
    safe = opened(args.safe, "--safe", tuned=False) if args.safe else None
    problems += misfits(aligned, named)
    if problems:
        raise UserError(*problems)
    return Inputs(aligned, tasks, unaligned, safe)


def hashes_of(inputs: Inputs) -> dict[str, str]:
    """What the result depends on: the base's fingerprint, and a hash per input."""
    hashes = {"base": fingerprint(inputs.aligned.checkpoint.folder)}
    if inputs.aligned.adapter:
        hashes["init_adapter"] = manifest.sha256(inputs.aligned.folder / WEIGHTS)
    # of an adapter the file, of a checkpoint its fingerprint: both change with any value
    named = {task.name: task for task in inputs.tasks} | {"unaligned": inputs.unaligned, "safe": inputs.safe}
    for key, model in named.items():
        if model:
            hashes[key] = manifest.sha256(model.folder / WEIGHTS) if model.adapter else fingerprint(model.folder)
    return hashes


def rank_of(inputs: Inputs, realignment: Realignment, args: RealignArgs) -> int:
    """The rank that an adapter needs: --rank, or what holds the result without loss; 0 for a checkpoint.

    Raises:
        UserError: nothing bounds the rank of this method's result.
    """
    if args.output == "dense":
        return 0
    # entries dropped at random leave a matrix of full rank, whatever the rank of the change was
    drops = getattr(realignment.parameters, "drop", 0)
    bounded = realignment.method.low_rank and realignment.rule.low_rank and not drops
    adapters = [model.adapter for model in (inputs.aligned, *inputs.others)]
    # the difference of two checkpoints has full rank, whatever was trained
    on_one = all(model.checkpoint.folder == inputs.aligned.checkpoint.folder for model in inputs.others)
    if args.rank:
        return args.rank
    if not bounded or not on_one:
        raise UserError(f"--output adapter: the result of {args.method}{f' and {args.rule}' if args.rule else ''} on these "
                        "models has no low rank; add --rank N to take the nearest LoRA (its error is printed), or use "
                        "--output dense")
    return sum(max(a.shape[0] for a, _ in adapter.modules.values()) for adapter in adapters if adapter)


class Summary:
    """What a realignment did, gathered weight by weight."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def over(self, changed: Iterable[Change]) -> Iterator[Change]:
        """The changes as they pass, each noted."""
        for change in changed:
            # fp64: squares of small changes vanish beside a large sum in fp32
            size = float(change.fused.double().square().sum())
            self.rows.append({"tensor": change.name, "change": size**0.5, "tasks": change.asked**0.5, **change.notes})
            yield change

    def metrics(self) -> dict[str, Any]:
        size, asked = (sum(row[key] ** 2 for row in self.rows) ** 0.5 for key in ("change", "tasks"))
        kept = [row["kept"] for row in self.rows if "kept" in row]
        return {"tensors": len(self.rows), "change_norm": size, "task_norm": asked,
                **({"kept": sum(kept) / len(kept)} if kept else {}),
                **({"layers_changed": sum("changed" in row for row in self.rows)}
                   if any("cosine" in row for row in self.rows) else {})}

    def said(self) -> str:
        m = self.metrics()
        return (f"{m['tensors']} tensors, change of norm {m['change_norm']:.4g} (the tasks': {m['task_norm']:.4g})"
                + (f", {m['layers_changed']} layers below tau" if "layers_changed" in m else ""))


def write_dense(changed: Iterable[Change], aligned: Model, args: RealignArgs, run: manifest.Run) -> str:
    """The aligned checkpoint with the changes added in fp32, rounded once; tensors without one are copied."""
    tensors = aligned.checkpoint.tensors
    wanted = DTYPES.get(args.out_dtype, "")
    kinds = {name: wanted if wanted and info.dtype in FLOATS else info.dtype for name, info in tensors.items()}
    layout = plan_layout([(name, kinds[name], info.shape) for name, info in tensors.items()], int(args.shard_gb * 1e9))
    writer, left, lost, size = Writer(run.folder, layout), set(tensors), 0.0, 0.0
    try:
        for change in changed:
            # summed in fp32 and rounded once; what the rounding took is told at the end
            exact = aligned.weight(change.name) + change.fused
            kept = _stored(exact, kinds[change.name], change.name)
            lost += float((kept.float() - exact).double().square().sum())
            size += float(change.fused.double().square().sum())
            writer.write(change.name, 0, kept)
            left.discard(change.name)
        # bytes as they are where nothing changed; an aligned adapter or another type makes even these anew
        for name in sorted(left):
            same = aligned.change(name) is None and kinds[name] == tensors[name].dtype
            writer.write(name, 0, raw(aligned, name) if same else _stored(aligned.weight(name), kinds[name], name))
        writer.finish()
    finally:
        writer.close()
    companions(aligned, set(kinds.values()), run.folder)
    # bfloat16 keeps 8 bits of a weight: more than half of a LoRA's change may drown in its rounding
    run.metrics["rounding"] = (lost / size) ** 0.5 if size else 0.0
    return f"; rounding to the checkpoint's type: {run.metrics['rounding']:.1%} of the change's norm"


def _stored(values: Tensor, kind: str, name: str) -> Tensor:
    data = values.to(getattr(torch, KINDS[kind][1]))
    if kind == "F16" and not torch.isfinite(data).all():
        raise UserError(f"{name}: the result is beyond float16's range; use --out_dtype bfloat16 or float32")
    return data


def companions(aligned: Model, kinds: set[str], folder: Path) -> None:
    """Configuration (with the new type) and tokenizer of the aligned model."""
    config = aligned.checkpoint.config
    names = {kind: name for name, kind in DTYPES.items() if kind in kinds}
    dtype = next(iter(names.values())) if len(names) == 1 else None
    manifest.write_json(folder / "config.json", written(config, section(config), dtype, None, head=False))
    for pattern in COMPANIONS:
        for file in aligned.checkpoint.folder.glob(pattern):
            if file.is_file() and file.name != INDEX:
                shutil.copyfile(file, folder / file.name)


def write_low_rank(changed: Iterable[Change], inputs: Inputs, rank: int, exact: Mapping[str, Pair] | None, args: RealignArgs,
                   run: manifest.Run) -> str:
    """The changes as a LoRA on the aligned model's checkpoint, each cut to the rank; what was cut off is reported.

    Args:
        exact: the LoRA itself, where a mask's factors give it; ``changed`` is then only gone through for the summary.

    Raises:
        UserError: a weight changes that no LoRA on a linear layer holds.
    """
    modules = _cut(changed, inputs.aligned, rank, args.seed)
    if exact:
        modules = {name: Fused(pair, pair_norm(pair), 0.0) for name, pair in exact.items()}
    if not modules:
        raise UserError(f"--tasks {args.tasks}: nothing is left of their change; there is no adapter to write")
    # task type and flags as the inputs had them; between checkpoints there is nothing to take over
    sources = [model.adapter for model in (inputs.aligned, *inputs.others) if model.adapter]
    origin = sources[0].config if sources else {"task_type": "CAUSAL_LM"}
    base = str(inputs.aligned.checkpoint.folder)
    largest = write_adapter(run.folder, {m: f.pair for m, f in modules.items()}, set(modules),
                            origin | {"base_model_name_or_path": base})
    for pattern in COMPANIONS:
        for file in inputs.aligned.checkpoint.folder.glob(pattern):
            if file.is_file() and file.name not in (INDEX, CONFIG):
                shutil.copyfile(file, run.folder / file.name)
    run.metrics.update(rank=largest, modules=len(modules), **truncation(modules, run.folder))
    return (f"; rank {largest}, {run.metrics['truncation_error']:.2%} of the norm cut off (worst: "
            f"{run.metrics['worst_module']}, {run.metrics['worst_error']:.2%}; all in {TRUNCATION})" + vllm_note(largest))


def _cut(changed: Iterable[Change], aligned: Model, rank: int, seed: int) -> dict[str, Fused]:
    """Module -> the change on the checkpoint, cut to the rank (0: not at all, for the caller has it already)."""
    family = family_of(SimpleNamespace(**aligned.checkpoint.config))
    linear = (*family.projections, *family.attention)
    modules: dict[str, Fused] = {}
    for change in changed:
        own = aligned.change(change.name)
        whole = change.fused if own is None else change.fused + own
        module = change.name.removesuffix(".weight")
        # an aligned adapter stays in the result: a LoRA on the checkpoint holds both changes
        if not whole.any() or not rank:
            continue
        if whole.dim() != 2 or module.rpartition(".")[2] not in linear:
            raise UserError(f"--output adapter: {change.name} changes, which no LoRA on a linear layer holds; "
                            "use --output dense")
        modules[module] = low_rank(whole, rank, seed=seed)
    return modules
