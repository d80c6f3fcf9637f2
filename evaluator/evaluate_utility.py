"""Utility: the papers' benchmarks through lm-eval, or embedded probes where no benchmark data is at hand.

    cd evaluator; python evaluate_utility.py --task_name cross_RUN --tasks copa,xcopa_zh,xnli_hi,gsm8k,mmlu
    cd evaluator; python evaluate_utility.py --task_name cross_RUN --tasks humaneval --allow_code_execution
    cd evaluator; python evaluate_utility.py --task_name cross_RUN --tasks probes

Every task has its own files, evaluate_utility.TASK.json and .rows.jsonl: scores of different calls stand side by side, and
a task that was scored with the same data and flags is not scored again. The scores need the model only: no answers are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import config
import console
import runtime
from errors import UserError, exit_on_user_error
from flags.utility import BENCHMARKS, EvaluateUtilityArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from evaluator.scoring.engine import Result, Subject, Work
    from evaluator.scoring.harness import Benchmark

#: The text whose next-token logits show whether an adapter does anything.
PROBE_TEXT = "What is the capital of France? The capital of France is"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EvaluateUtilityArgs, argv)
        args: EvaluateUtilityArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        # greedy word problems fork no tokenizer threads
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from evaluator.scoring import engine

        # one plan per task and subject, but hash and model of a subject once
        paths = engine.evaluate_all([(args.only(name), f"evaluate_utility.{name}") for name in args.task_names],
                                    partial(plan, cache(partial(engine.model_hash, args)), one_model(args)))
        console.finish(paths, [*args.table, *console.same(parsed, "output_dir")])


def one_model(args: EvaluateUtilityArgs) -> Callable[[Subject], tuple[Any, float | None]]:
    """``load_checked``, but the model of the subject that was asked for last is kept for its other tasks."""
    held: dict[Subject, tuple[Any, float | None]] = {}

    def load(subject: Subject) -> tuple[Any, float | None]:
        if subject not in held:
            held.clear()  # before the next one is read: two 7B models need not fit beside each other
            held[subject] = load_checked(args, subject)
        return held[subject]

    return load


def plan(model_hash: Callable[[Subject], str], load: Callable[[Subject], tuple[Any, float | None]],
         args: EvaluateUtilityArgs, subject: Subject) -> Work:
    """What the score of one subject on one task depends on and how it is made; data is read before any model.

    Args:
        args: of the one task (``EvaluateUtilityArgs.only``).
    """
    from data.sets import probes
    from evaluator.scoring import engine, harness

    name, inputs = args.tasks, {"model": model_hash(subject)}
    if name in BENCHMARKS:
        benchmark = harness.build(args, name)
        # lm-eval's version counts: its prompts and filters change between releases
        inputs[name] = f"{benchmark.data} lm-eval {harness.version()}"
        if name == "humaneval":
            # programs that could reach their tests, and unseeded tests, gave scores that compare with no later one
            inputs[name] += " tests in a process of their own"
        return engine.Work(inputs, lambda: score_benchmark(args, load(subject), benchmark))
    rows = probes.rows(name, args.rows_of(name))
    inputs[name] = engine.content_hash(rows)
    return engine.Work(inputs, lambda: score_probe(args, load(subject), name, rows))


def score_benchmark(args: EvaluateUtilityArgs, model: tuple[Any, float | None], benchmark: Benchmark) -> Result:
    """The model's score on one of lm-eval's benchmarks."""
    from evaluator.scoring import engine, harness

    loaded, change = model
    scores, rows, details = harness.run(benchmark, loaded, args)
    return engine.Result(scores, rows, _details(benchmark.name, details, change))


def score_probe(args: EvaluateUtilityArgs, model: tuple[Any, float | None], name: str, rows: list) -> Result:
    """The model's score on one of the embedded probes."""
    from data.sets.probes import PROBES
    from evaluator.scoring import baselines, engine, utility_probes

    loaded, change = model
    if PROBES[name].kind == "choice":
        score, lines = utility_probes.score_choices(loaded, name, rows, args.batch_tokens)
        return engine.Result([score], lines, _details(name, {}, change) | {"baselines": baselines.preference(rows, name)})
    score, lines = utility_probes.score_numbers(loaded, name, rows, args.max_new_tokens, args.harness_batch_size, args.seed)
    return engine.Result([score], lines, _details(name, {"max_new_tokens": args.max_new_tokens}, change))


def _details(name: str, said: dict[str, Any], change: float | None) -> dict[str, Any]:
    return {"utility": {name: said} | ({} if change is None else {"logit_change": change})}


def load_checked(args: EvaluateUtilityArgs, subject: Subject) -> tuple[Any, float | None]:
    """The subject's model, and how far its logits are from the base model's (None for the base and for full models).

    Raises:
        UserError: an adapter or fused MoE gives the base model's logits: it would be scored as what it is not.
    """
    from evaluator.scoring import engine
    from models.run_folders import ADAPTER, MOE, parts_of, run_folder

    if not subject.run:
        return engine.load(args, subject), None
    if not parts_of(subject.run):
        folder = run_folder(args.results, subject.run, args.checkpoint_number)
        if not any((folder / name).is_file() for name in (ADAPTER, MOE)):
            return engine.load(args, subject), None
    # one after the other: two 7B models need not fit beside each other
    base = _logits(engine.load(args, engine.Subject("raw", "")))
    loaded = engine.load(args, subject)
    mine = _logits(loaded)
    # another shape is another vocabulary, which is change enough
    change = float((mine - base).abs().max()) if mine.shape == base.shape else float("inf")
    if change == 0:
        raise UserError(f"{subject.run}: changes no logit of the base model at --dtype {args.dtype}: the adapter or its "
                        "experts are zero, or too small for this dtype; train it, score the base instead (--task_name "
                        "raw), or give --dtype float32")
    return loaded, round(change, 6)


def _logits(loaded: Any) -> Any:
    """(tokens, vocabulary) logits of a fixed text, in float32 on the CPU."""
    import torch

    ids = loaded.tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"].to(loaded.device)
    with torch.inference_mode():
        return loaded.model(input_ids=ids, use_cache=False).logits[0].float().cpu()


if __name__ == "__main__":
    main()
