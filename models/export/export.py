"""Write a run in a layout of other software: checked, planned, streamed. The command behind ``models/fuse.py export``."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import manifest
from errors import UserError
from flags.export import ExportArgs
from models.checkpoints.writer import Layout, Writer, plan_layout
from models.export import layouts
from models.export.card import write_card
from models.export.companions import write_companions, write_licences
from models.export.plan import dense_plan, moe_plan
from models.export.sources import Source, open_source
from models.export.write import Rounding, write_weights
from models.merging.budget import Budget, budget
from models.merging.methods import METHODS
from models.merging.plan import MergePlan

log = logging.getLogger(__name__)


def export(args: ExportArgs) -> str:
    """Check, plan, and with ``--dry_run`` return the plan; else write ``results/outputs/NAME`` and say what was written.

    Raises:
        UserError: no such run, or nothing that the layout can hold; before any file is written, all at once.
    """
    target = args.results / "outputs" / args.name
    with ExitStack() as stack:
        source = open_source(args, stack)
        if problems := _problems(args, source, target):
            raise UserError(*problems)
        # by content: the same name over a retrained run is another export
        settings = asdict(args) | {"run": source.name, "run_name": args.name, "inputs": dict(source.hashes)}
        if not (args.overwrite or args.dry_run) and manifest.finished(target, settings):
            return f"{target}: already exported"
        if args.layout == "peft":
            said, metrics = _as_adapters(args, source, target, settings)
        else:
            said, metrics = _as_model(args, source, target, settings)
    if metrics:
        manifest.register(args.results, {"kind": "run", "command": "export", "run": args.name, **metrics})
    return said


def _as_model(args: ExportArgs, source: Source, target: Path, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    rounding = Rounding(args.out_dtype)
    row = _row(args, source)
    plan = moe_plan(source, row, args.out_dtype, rounding) if row else dense_plan(source, args, rounding)
    layout: Layout
    writer: type[Writer]
    if args.layout == "gguf":
        from models.export import gguf_file

        plan, layout = gguf_file.planned(plan, source, args.out_dtype, f"{args.name}.gguf", args.name)
        writer = gguf_file.GgufWriter
    else:
        layout = plan_layout([(job.name, job.dtype, job.shape) for job in plan.jobs], int(args.shard_gb * 1e9))
        writer = Writer
    cost = budget(plan, METHODS["passthrough"], args.memory_gb, args.threads, target.parent)
    description = describe(source, args, plan, layout, cost)
    if args.dry_run:
        return description, {}
    log.info(description)
    with manifest.writing(target, "export", settings, overwrite=args.overwrite, resume=True) as run:
        write_weights(plan, layout, cost, run, writer)
        if args.layout == "gguf":
            write_licences(source, run.folder)
        else:
            write_companions(source, run.folder, dict(plan.config))
        run.metrics.update(layout=args.layout, rounding=rounding.share, promised_gb=args.memory_gb)
        _card(source, args, run, rounding.share)
        _record(source, run)
    return (f"{target}: {args.layout}, {len(plan.jobs)} tensors" + (
        f"; rounding to the file's type: {rounding.share:.1%} of the change's norm" if rounding.share else ""), run.metrics)


def _row(args: ExportArgs, source: Source) -> layouts.MoeLayout | None:
    """The layout of experts that is written; None for one plain model."""
    if args.layout != "gguf":
        return layouts.LAYOUTS.get(args.layout)
    from models.export.gguf_file import EXPERTS

    return EXPERTS if source.moe and not (args.merge_expert or args.average) else None


def _as_adapters(args: ExportArgs, source: Source, target: Path, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from models.export.adapter_folders import write_adapters

    if args.dry_run:
        return f"{target}: adapters on {source.base.folder}, exact; nothing written", {}
    with manifest.writing(target, "export", settings, overwrite=args.overwrite) as run:
        said = write_adapters(source, args, run)
        _card(source, args, run, 0.0)
        _record(source, run)
    return f"{target}: {said}", run.metrics


def _record(source: Source, run: manifest.Run) -> None:
    run.parents.extend(map(str, source.folders))
    run.inputs.update(source.hashes)


def _problems(args: ExportArgs, source: Source, target: Path) -> list[str]:
    """What the flags ask for that this run has not, or the layout cannot hold."""
    found = []
    if target.resolve() in [folder.resolve() for folder in (*source.folders, source.base.folder)]:
        found.append(f"--run_name {args.name}: {target} is what is exported; choose another name")
    picks = f"--merge_expert {args.merge_expert}" if args.merge_expert else "--average" if args.average else ""
    names = [expert.name for expert in source.experts]
    if picks and not names:
        found.append(f"{picks}: {source.name} is no fused MoE and has no experts; drop the flag")
    elif args.merge_expert and args.merge_expert not in names:
        found.append(f"{picks}: no expert of {source.name}; allowed: {', '.join(names)}")
    if picks and args.layout in layouts.LAYOUTS:
        found.append(f"{picks}: makes one plain model, and --layout {args.layout} is for all experts with their router; "
                     "give --layout dense")
    if args.layout == "dense" and names and not picks:
        found.append(f"--layout dense: {source.name} has {len(names)} experts; say which becomes the plain model: "
                     f"--merge_expert NAME ({', '.join(names)}) or --average")
    if args.layout == "dense" and not (names or source.common or source.head):
        found.append(f"--layout dense: {source.name} is a plain model already; models/fuse.py merge takes it as it is")
    if args.layout in layouts.LAYOUTS:
        found += layouts.problems(layouts.LAYOUTS[args.layout], source)
    elif args.layout == "peft" and not found:
        from models.export import adapter_folders

        found += adapter_folders.problems(source, args)
    elif args.layout == "gguf":
        from models.export import gguf_file

        found += gguf_file.problems(source)
    return found


def describe(source: Source, args: ExportArgs, plan: MergePlan, layout: Layout, cost: Budget) -> str:
    """The plan as text: what is written from what, and what it costs."""
    weights = sum(prod(job.shape) for job in plan.jobs)
    lines = [
        f"{source.name} as {args.layout}: {len(plan.jobs)} tensors, {weights / 1e6:,.1f} M weights",
        f"read    {cost.bytes_read / 1e9:.2f} GB",
        f"write   {layout.total / 1e9:.2f} GB in {len(layout.headers)} file(s)",
        f"memory  {cost.peak_bytes / 2**30:.2f} GB at most, beyond the interpreter ({cost.workers} workers)",
        f"time    {cost.seconds:.1f} s at least, at the {cost.read_per_second / 1e9:.1f} GB/s read and "
        f"{cost.write_per_second / 1e9:.1f} GB/s written just now",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _card(source: Source, args: ExportArgs, run: manifest.Run, rounding: float) -> None:
    experts, picked = len(source.experts), args.merge_expert or args.average
    whole = bool(_row(args, source))
    form = "as a PEFT adapter" if args.layout == "peft" else "as a plain model"
    what = f"`{source.name}` in its base's weights, {form}"
    if whole:
        what = f"a mixture of {experts} experts in the layout of {args.layout}, made from `{source.name}`"
    elif picked:
        part = f"expert `{args.merge_expert}`" if args.merge_expert else f"the average of the {experts} experts"
        what = f"{part} of the mixture `{source.name}`, {form}"
    elif args.layout == "peft":
        what = f"the {experts} experts of the mixture `{source.name}`, each as a PEFT adapter in a folder of its name"
    loader = {"peft": "PeftModel.from_pretrained(BASE, FOLDER)", "gguf": f"llama-server -m {args.name}.gguf"}.get(
        args.layout, "AutoModelForCausalLM.from_pretrained")
    facts = [f"{what[0].upper()}{what[1:]}. Written by Alignment-by-Fusion (`models/fuse.py export`); `{loader}` loads it."]
    limits = ["The licence and the limits of the base go on.",
              "Prompts belong into the template that the run was trained with (above; `chat`: the one beside this file)."]
    if rounding:
        limits.append(f"Weights are rounded to the file's type: the rounding's norm is {rounding:.1%} of the change's; the "
                      "run before its export keeps the change in fp32.")
    if whole:
        limits += ["The run routes in fp32; software that computes router logits in 16 bits sends a few tokens to other "
                   "experts.",
                   f"It holds {experts} whole FFNs a layer where the run shares one: {experts} times their memory."]
    elif source.moe:
        limits.append("The router is not part of it: every token goes to the same weights, so it is another model than the "
                      "mixture.")
    write_card(run.folder, source, args.model_name_or_path, args.name, facts, limits,
               None if source.moe and not whole else args.results)
