"""Write a run in a layout of other software: checked, planned, streamed. The command behind ``models/fuse.py export``."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from math import prod

import manifest
from errors import UserError
from flags.export import ExportArgs
from models.checkpoints.writer import Layout, plan_layout
from models.export import layouts
from models.export.card import write_card
from models.export.companions import write_companions
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
        problems = [*_problems(args, source), *(layouts.problems(layouts.LAYOUTS[args.layout], source)
                                                if args.layout in layouts.LAYOUTS else [])]
        if target.resolve() in [folder.resolve() for folder in (*source.folders, source.base.folder)]:
            problems.append(f"--run_name {args.name}: {target} is what is exported; choose another name")
        if problems:
            raise UserError(*problems)
        # by content: the same name over a retrained run is another export
        settings = asdict(args) | {"run": source.name, "run_name": args.name, "inputs": dict(source.hashes)}
        if not (args.overwrite or args.dry_run) and manifest.finished(target, settings):
            return f"{target}: already exported"
        rounding = Rounding(args.out_dtype)
        plan = (moe_plan(source, layouts.LAYOUTS[args.layout], args, rounding) if args.layout in layouts.LAYOUTS
                else dense_plan(source, args, rounding))
        layout = plan_layout([(job.name, job.dtype, job.shape) for job in plan.jobs], int(args.shard_gb * 1e9))
        cost = budget(plan, METHODS["passthrough"], args.memory_gb, args.threads, target.parent)
        description = describe(source, args, plan, layout, cost)
        if args.dry_run:
            return description
        log.info(description)
        with manifest.writing(target, "export", settings, overwrite=args.overwrite, resume=True) as run:
            write_weights(plan, layout, cost, run)
            write_companions(source, run.folder, dict(plan.config))
            run.metrics.update(layout=args.layout, rounding=rounding.share, promised_gb=args.memory_gb)
            _card(source, args, run, rounding)
            run.parents.extend(map(str, source.folders))
            run.inputs.update(source.hashes)
    manifest.register(args.results, {"kind": "run", "command": "export", "run": args.name, **run.metrics})
    return (f"{target}: {args.layout}, {len(plan.jobs)} tensors"
            + (f"; rounding to the file's type: {rounding.share:.1%} of the change's norm" if rounding.share else ""))


def _problems(args: ExportArgs, source: Source) -> list[str]:
    """What the flags ask for that this run has not."""
    found = []
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


def _card(source: Source, args: ExportArgs, run: manifest.Run, rounding: Rounding) -> None:
    experts = len(source.experts)
    whole = args.layout in layouts.LAYOUTS
    what = f"`{source.name}` in its base's weights, as a plain model"
    if whole:
        what = f"a mixture of {experts} experts in the layout of {args.layout}, made from `{source.name}`"
    elif args.merge_expert or args.average:
        part = f"expert `{args.merge_expert}`" if args.merge_expert else f"the average of the {experts} experts"
        what = f"{part} of the mixture `{source.name}`, as a plain model"
    facts = [f"{what[0].upper()}{what[1:]}. Written by Alignment-by-Fusion (`models/fuse.py export`); "
             "`AutoModelForCausalLM.from_pretrained` loads it."]
    limits = ["The licence and the limits of the base go on.",
              "Prompts belong into the template that the run was trained with (above; `chat`: the one beside this file)."]
    if rounding.share:
        limits.append(f"Weights are rounded to the file's type: the rounding's norm is {rounding.share:.1%} of the "
                      "change's; the run before its export keeps the change in fp32.")
    if whole:
        limits += ["The run routes in fp32; software that computes router logits in 16 bits sends a few tokens to other "
                   "experts.",
                   f"It holds {experts} whole FFNs a layer where the run shares one: {experts} times their memory."]
    write_card(run.folder, source, args.model_name_or_path, args.name, facts, limits,
               None if args.merge_expert or args.average else args.results)
