"""Sweep the fusion weight of two adapters, refine where non-refusal breaks, score the controls, write the report.

    python scripts/sweep.py --task identity --safety safe --prompt_styles orbit,none --controls "joint=joint,mix=mix3"
    python scripts/sweep.py --roots results/lora_fusion,results/lora_fusion/seed_43 --name identity

Models of the sweep are weighted sums that are fused while they load (task@0.6_safe@0.4); no adapter is written. Every answer
and score is one of inference.py and the evaluators, so a sweep that was cut off goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import config
import console
import runtime
from errors import UserError, exit_on_user_error
from flags.mixture import mixture_run
from flags.sweep import SweepArgs
from flags.utility import BENCHMARKS, EvaluateUtilityArgs

if TYPE_CHECKING:
    from evaluator.reporting.sweeps.curve import Point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A model to score: its label, its run, its lambda (NaN: none)."""

    label: str
    run: str
    weight: float = float("nan")


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(SweepArgs, argv)
        args: SweepArgs = parsed.args
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        from evaluator.reporting.sweeps import report as sweep_report
        from evaluator.reporting.sweeps import seeds as sweep_seeds
        from models.runs import keeping_base

        with keeping_base(), console.steps():
            report = sweep_seeds.over_seeds(args.folders, args.name) if args.folders else sweep(args, parsed.preset)
        name = f"{args.name}_seeds" if args.folders else args.name
        path = sweep_report.write(args.results / "report", name, report)
        console.show_written(path.read_text(encoding="utf-8"), [path])
        if not args.folders:
            console.advise(["evaluator/report.py", "--runs", f"base,{args.task},{args.safety}", "--curves",
                            str(path.with_suffix(".json")), "--html", *console.same(parsed, "output_dir")])


def sweep(args: SweepArgs, preset: str) -> dict:
    """Score the grid, refine, score the controls; returns the report's content."""
    from evaluator.reporting.sweeps import curve
    from evaluator.reporting.sweeps import report as sweep_report

    check(args)
    style, *others = args.styles
    grid = list(args.lambdas)
    rows = {"fusion": [fused(args, weight) for weight in grid]}
    score(rows["fusion"], style, args, preset)
    extended = []
    # in steps of the grid's last one, up to 1; the published grid alone never reached the cliff (docs/lab-log.md)
    while args.extend and curve.unbroken(points(rows["fusion"], style, args)) and grid[-1] < 1:
        # rounded: 0.3 + 0.3 - 0.2 is 0.39999999999999997, and the lambda is part of a run's name
        extended.append(min(1.0, round(grid[-1] + grid[-1] - grid[-2], 10)))
        grid.append(extended[-1])
        log.info("non-refusal has not halved at lambda %g: going on at %g", grid[-2], grid[-1])
        rows["fusion"].append(fused(args, grid[-1]))
        score(rows["fusion"][-1:], style, args, preset)
    # after extending: controls stand at the lambdas that fusion was measured at
    rows |= controls(args, grid)
    score([row for group in rows.values() for row in group], style, args, preset)
    steps, stopped = [], f"{args.refine} further lambdas were allowed"
    while True:
        # asked once more after the last allowed step, to say why it could have stopped
        weight, why = curve.next_weight(points(rows["fusion"], style, args), args.min_step)
        if weight is None:
            stopped = why
            break
        if len(steps) == args.refine:
            break
        log.info("refining at lambda %g: %s", weight, why)
        steps.append({"weight": weight, "why": why})
        rows["fusion"].append(fused(args, weight))
        score(rows["fusion"][-1:], style, args, preset)
    rows["fusion"].sort(key=lambda row: row.weight)
    coarse = {"fusion": [row for row in rows["fusion"] if row.weight in grid], "control": rows.get("control", [])}
    # other styles at the coarse grid only: where to refine was decided by the first
    for other in others:
        score([row for group in coarse.values() for row in group], other, args, preset)
    facts = {"task": args.task, "safety": args.safety, "form": args.form, "style": style, "utility": args.utility,
             "sets": [args.harmful_task, args.overrefusal_task],
             "refinement": steps, "extended": extended, "stopped": stopped}
    return sweep_report.summary({group: points(members, style, args) for group, members in rows.items()},
                                {other: {group: points(members, other, args) for group, members in coarse.items()}
                                 for other in others}, facts, args.seed)


def check(args: SweepArgs) -> None:
    """Every run that the sweep needs is there, before anything is loaded; a UserError names all that lack."""
    from models.run_folders import run_files

    problems = []
    for run in (args.task, args.safety, args.random, *args.named_controls.values()):
        if run and run != "base":
            try:
                run_files(args.results, run)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    if wanted := [name for name in args.named_benchmarks if name in BENCHMARKS]:
        from evaluator.scoring import harness

        for name in wanted:
            # data that lacks shows here and not after an hour of answers
            harness.build(EvaluateUtilityArgs(**benchmark_flags(args)), name)


def benchmark_flags(args: SweepArgs) -> dict[str, Any]:
    """What evaluate_utility.py is asked for beside the models."""
    return {"tasks": args.benchmarks, "data_dir": args.data_dir, "num_samples": args.benchmark_samples}


def fused(args: SweepArgs, weight: float, safety: str | None = None, label: str = "lambda") -> Row:
    """The weighted sum at a lambda."""
    task = 1 - weight if args.form == "convex" else 1.0
    parts = ((args.task, task), (safety or args.safety, weight))
    # an adapter of weight 0 changes nothing; without it, lambda 0 is one and the same run in every sweep
    return Row(f"{label} {weight:g}", mixture_run(tuple(part for part in parts if part[1])), weight)


def controls(args: SweepArgs, grid: Sequence[float]) -> dict[str, list[Row]]:
    """Group -> rows, at the lambdas of the grid."""
    inner = [weight for weight in grid if 0 < weight < 1]
    groups: dict[str, list[Row]] = {}
    if args.shrink:
        groups["shrink"] = [Row(f"shrink only, {1 - w:g}", mixture_run(((args.task, 1 - w),)), w) for w in inner]
    if args.random:
        groups["random"] = [fused(args, w, args.random, "random direction,") for w in inner]
    asked = [weight for weight in args.lambdas if 0 < weight < 1]
    if args.reverse and asked:
        # of the grid as it was asked for: an extended one ends elsewhere in every seed
        task = 1 - asked[-1] if args.form == "convex" else 1.0
        groups["reverse"] = [Row(f"order reversed, {asked[-1]:g}", mixture_run(((args.safety, asked[-1]),
                                                                                (args.task, task))), asked[-1])]
    if args.named_controls:
        groups["control"] = [Row(label, "" if run == "base" else run) for label, run in args.named_controls.items()]
    return groups


def score(rows: Iterable[Row], style: str, args: SweepArgs, preset: str) -> None:
    """Answers and scores of every row in one style of prompts; what is there already is left as it is."""
    import inference
    from evaluator import evaluate_refusal, evaluate_safety, evaluate_skills, evaluate_utility
    from evaluator.scoring import answer_scores

    # lambda 0 and the task's own run are one model: answered once
    runs = list(dict.fromkeys(row.run for row in rows))
    if not runs:
        return
    common = ["--preset", preset, "--model_name_or_path", args.model_name_or_path, "--output_dir", args.output_dir,
              "--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads), "--seed", str(args.seed),
              "--template", args.template, *(["--cache_dir", args.cache_dir] if args.cache_dir else [])]
    samples = ["--num_samples", str(args.num_samples)]
    named, batch = ["--cross_task", ",".join(run or "base" for run in runs)], ["--batch_size", str(args.batch_size)]
    folders = ",".join(f"cross_{run}" if run else "raw" for run in runs)
    # prompts as they are, so that one style's sweep scores them for all; before any answer is made, for it refuses models
    # that reason first
    if style == args.styles[0] and args.discrimination:
        evaluate_refusal.main(["--task_name", folders, "--num_samples", str(args.discrimination), *common])
    files = args.source_files
    exact = ["--prompt_style_file", files[style]] if style in files else []
    for task in (args.harmful_task, args.overrefusal_task):
        inference.main(["--task_name", task, *named, "--prompt_style", style, *exact, "--max_new_tokens",
                        str(args.max_new_tokens), *(["--data_path", files[task]] if task in files else []),
                        *batch, *samples, *common])
    suffix = "" if style == "none" else f"+{style}"
    evaluate_safety.main(["--task_name", folders, "--harmful_task", f"{args.harmful_task}{suffix}", "--overrefusal_task",
                          f"{args.overrefusal_task}{suffix}", *samples, *common])
    evaluate_skills.main(["--task_name", folders, "--skills", args.utility, *samples, *common])
    # benchmarks and task rows are asked as they are, so that one style's sweep scores them for all
    if style == args.styles[0] and args.benchmarks:
        flags = [word for name, value in benchmark_flags(args).items() for word in (f"--{name}", str(value))]
        evaluate_utility.main(["--task_name", folders, *flags, *common])
    if style == args.styles[0] and args.utility_answers and args.utility in answer_scores.TASKS:
        few = ["--num_samples", str(args.utility_answers)]
        inference.main(["--task_name", args.utility, *named, "--prompt_style", "none", "--max_new_tokens",
                        str(answer_scores.TASKS[args.utility].max_new_tokens), *batch, *few, *common])
        evaluate_skills.main(["--task_name", folders, "--skills", answer_scores.set_name(args.utility), *few, *common])


def points(rows: Iterable[Row], style: str, args: SweepArgs) -> list[Point]:
    """What the evaluators wrote for these rows."""
    from evaluator.reporting.sweeps.curve import point
    from evaluator.statistics.comparison import measured

    suffix = "" if style == "none" else f"+{style}"
    sets = f"{args.harmful_task}{suffix}", f"{args.overrefusal_task}{suffix}"
    # measured once for all styles, shown in the deciding one
    told = bool(args.discrimination) and style == args.styles[0]
    return [point(row.label, row.run or "base", row.weight, measured(args.results, row.run), sets, args.utility,
                  args.named_benchmarks, told) for row in rows]


if __name__ == "__main__":
    main()
