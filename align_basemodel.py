"""Train one expert, the naive mix, the fused MoE, or a mask on task vectors.

    python align_basemodel.py --moe_flag 0 --task_name safety
    python align_basemodel.py --moe_flag 0 --task_name safety --method dpo
    python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01
    python align_basemodel.py --moe_flag 0 --task_name dialogs --data_path few.jsonl --method soup --adapters identity,safe
    python align_basemodel.py --method mask --aligned aligned --tasks english,maths --merge_rule ties

Writes results/outputs/RUN (adapter or fused model, tokenizer, manifest.json). The same command again does nothing when
the run is finished and resumes from its last checkpoint when it is not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import config
import console
import manifest
import runtime
from errors import exit_on_user_error, fits
from flags import OBJECTIVES, AlignArgs, DpoArgs, ExpertArgs, FusedMoeArgs, MaskArgs, SearchArgs, SoupArgs
from flags.base import DIALOGS
from flags.memory import smaller
from models.footprint.planned import planned

#: Objective -> the module that trains it; flags/align.py says which words choose the objective.
TRAINERS: dict[type[AlignArgs], str] = {
    FusedMoeArgs: "training.moe", ExpertArgs: "training.sft", DpoArgs: "training.dpo", MaskArgs: "training.mask",
    SoupArgs: "training.soup", SearchArgs: "training.soup"}


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(AlignArgs, argv)
        if planned(parsed, print):
            return
        args: AlignArgs = parsed.args
        # of the processes of a launch one tells how it goes; all tell what is wrong
        console.set_up(parsed.verbosity, speaks=manifest.is_main())
        runtime.collect_rarely()
        runtime.short_waits()
        runtime.keep_freed_memory()
        settings = args.settings(parsed.training)
        target = args.results / "outputs" / args.name
        if not args.overwrite and manifest.finished(target, settings):
            if manifest.is_main():
                console.show(f"{target}: already trained", str(target))
            return
        with fits(smaller(args, parsed.training)), \
                manifest.writing(target, "align_basemodel", settings, overwrite=args.overwrite) as run:
            # torch is imported only now
            importlib.import_module(TRAINERS[type(args)]).train(args, parsed.training, run)
        if manifest.is_main():
            _finish(parsed, run, target)


def _finish(parsed: config.Parsed, run: manifest.Run, target: Path) -> None:
    args: AlignArgs = parsed.args
    shown = {k: v for k, v in run.metrics.items() if k not in ("history", "validation_history")}
    manifest.register(args.results, {"kind": "run", "command": "align_basemodel", "run": args.name, "seed": args.seed,
                                     **shown})
    console.show(_last_screen(parsed, run.metrics, target), str(target))


def _last_screen(parsed: config.Parsed, metrics: dict[str, Any], target: Path) -> str:
    """What was trained, its main numbers, what it cost, where it lies, what to try next; the manifest has every number."""
    from training.tracking.progress import figures

    args, made = parsed.args, manifest.read(target)
    # a search takes no step
    loss = f"{metrics['train_loss']:.4g}, mean of {metrics['steps']} steps" if "steps" in metrics else (
        f"{metrics['loss']:.4g}, {metrics['loss_at_start']:.4g} without adapters; {metrics['evaluations']} evaluations")
    validated = {name.removeprefix("validation_"): metrics[name] for name in metrics if name.startswith("validation_")}
    validation = [f"loss {validated['loss']:.4g}", *figures(validated)] if "loss" in validated else []
    data = " and ".join(f"{metrics[name]:,} {name}" for name in ("pairs", "tokens") if name in metrics)
    trained = f"{metrics['trainable_parameters']:,} parameters" if "trainable_parameters" in metrics else ""
    torch = sys.modules["torch"]  # of the training
    card = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the card's" if torch.cuda.is_initialized() else ""
    return console.last_screen(f"{args.name}: {args.called}, trained", {
        "loss": loss,
        "validation": ", ".join(validation) + (f"; best at step {metrics['best_step']}" if "best_step" in metrics else ""),
        "weights": ", ".join(f"{name} {value:.3g}" for name, value in metrics.get("weights", {}).items()),
        "mask": f"keeps {metrics['kept']:.1%}" if "kept" in metrics else "",
        "trained": " on ".join(filter(None, (trained, data))),
        "took": console.cost(made["seconds"], made["peak_memory_mb"]) + card,
        "lies in": str(target),
        "next": console.following(_next(parsed))})


def _next(parsed: config.Parsed) -> list[str]:
    """What one does with such a run first."""
    args, place = parsed.args, ("model_name_or_path", "output_dir", "cache_dir")
    if isinstance(args, MaskArgs):
        return ["evaluator/mask_figures.py", "--masks", args.name, *console.same(parsed, *place)]
    if args.task_name in DIALOGS:  # rows of a user: whether the run is safe, beside its base
        # what "base" answered in these results is of the base before a run was one
        base = Path(args.model_name_or_path).expanduser().resolve()
        beside = base.name if base.parent == args.results / "outputs" else "base"
        return ["evaluator/evaluate.py", "--models", f"{beside},{args.name}", "--suite", "safety",
                *console.same(parsed, *place, "template")]
    task = args.task_name if args.task_name in OBJECTIVES else "safety"
    return ["inference.py", "--task_name", task, "--cross_task", args.name, *console.same(parsed, *place, "template")]


if __name__ == "__main__":
    main()
