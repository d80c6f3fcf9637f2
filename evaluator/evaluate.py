"""Several models answered and scored, and one table of them.

    python evaluator/evaluate.py --models "base,mine=/path/to/folder,other=org/name,RUN" --suite safety
    python evaluator/evaluate.py --models "A,B" --suite all --dry_run

Every step is a command line of its own, run as a process of its own: inference.py, evaluator/evaluate_*.py, at the end
evaluator/report.py. So one model is in memory at a time, a crash ends one step and no other model's, and the scores are
those of the single commands. What is finished is not done again.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import config
import console
import preset_choice
from config import ROOT
from errors import UserError, exit_on_user_error
from flags.evaluate import format_names
from flags.evaluate_models import EvaluateModelsArgs
from flags.judges import JudgeFlags

if TYPE_CHECKING:
    from evaluator.scoring.named_models import Model
    from evaluator.scoring.suites import Part

log = logging.getLogger(__name__)
#: Flags that go on to the steps -> whether they are always said: a preset of a step's own must not decide these.
_PASSED = {"output_dir": True, "template": True, "dtype": True, "max_new_tokens": True, "batch_size": True, "device": False,
           "threads": False, "seed": False, "cache_dir": False, "overwrite": False, "num_samples": False, "do_sample": False,
           "temperature": False, "top_p": False, "backend": False, "data_source": False, "batch_tokens": False,
           "lite": False, "title": False, "published": False, "device_map": False}
#: What every step of a model is told, and what inference.py is.
_ALL = ("num_samples", "output_dir", "template", "device", "device_map", "dtype", "threads", "seed", "cache_dir",
        "overwrite")
_ANSWERS = ("max_new_tokens", "batch_size", "do_sample", "temperature", "top_p", "backend")
#: Lines of a failed step that are repeated at the end.
_REPEATED = 3
#: The command that writes the table.
REPORT = "evaluator/report.py"


@dataclass(frozen=True)
class Step:
    """One command line for the models of one base.

    Args:
        words: the command line for some of the models; it begins with its file, relative to the repository.
        task: what it answers; empty: it scores.
        needs: tasks whose answers it reads.
    """

    models: tuple[Model, ...]
    words: Callable[[Sequence[Model]], tuple[str, ...]]
    task: str = ""
    needs: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        words = sys.argv[1:] if argv is None else list(argv)
        args, models, preset = prepare(words)
        planned = steps(args, models, preset)
        report = table(args, models)
        if args.dry_run:
            from evaluator.scoring import named_models

            links = [line for model in models if (line := named_models.link_command(model, args.results))]
            for line in [shlex.join(["mkdir", "-p", str(args.results / "outputs")]), *links] if links else []:
                print(line)
            for step in planned:
                print(console.shown(step.words(step.models)))
            print(console.shown(report))
            return
        try:
            with console.steps():
                failed = run(args, models, planned)
        except KeyboardInterrupt:
            log.error("interrupted; what is finished is kept, and the same command goes on from there")
            sys.exit(130)
    if failed:
        lost = sum(model.label in failed for model in models)
        log.error("%s failed; what is finished is kept, and the same command goes on from there:",
                  f"{lost} of {len(models)} models" if lost else "no model, but the table")
        for label, why in failed.items():
            log.error("  %s: %s", label, why)
        sys.exit(1)
    if "html" not in format_names(args.format):
        console.advise((*report, "--html"))


def prepare(words: Sequence[str]) -> tuple[EvaluateModelsArgs, list[Model], str]:
    """Flags and models, checked; and the preset that the steps are told, empty where none was asked for.

    Raises:
        UserError: everything that can be known to be wrong before a model is loaded.
    """
    parsed = config.parse(EvaluateModelsArgs, words)
    console.set_up(parsed.verbosity)
    # imported after the flags: --help and their errors must not wait for torch
    from evaluator.scoring import named_models, suites

    args, asked = parsed.args, preset_choice.choose(words).asked
    models, problems = named_models.read(args, "model_name_or_path" in parsed.given)
    fitting = {preset_choice.choose(["--model_name_or_path", model.base]).name for model in models}
    if fitting == {preset_choice.OWN_PRESET} and not asked:
        args = config.parse(EvaluateModelsArgs, ["--preset", preset_choice.OWN_PRESET, *words]).args
        if parsed.preset != preset_choice.OWN_PRESET:
            log.info("preset %s: no model of --models is on the base of the preset %s", preset_choice.OWN_PRESET,
                     parsed.preset)
    for number, model in enumerate(models):
        models[number], wrong = named_models.check(model, args, fetch=not args.dry_run)
        problems += wrong
    if args.base and not any(args.base in (model.label, model.in_report) for model in models):
        problems.append(f"--base {args.base}: none of the models; allowed: {', '.join(model.label for model in models)}")
    problems += suites.problems(args, has_base=any(not model.run for model in models))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return args, models, parsed.preset if asked else ""


def steps(args: EvaluateModelsArgs, models: Sequence[Model], preset: str) -> list[Step]:
    """Every step in its order: of each part of the suites the answers, then the scores; models of one base together.

    Together they take one start of Python and one fit of the judges. All answers come before scores, for a judge may compare
    with those of the base.
    """
    from evaluator.scoring import suites

    bases: dict[str, list[Model]] = {}
    for model in sorted(models, key=lambda model: bool(model.run)):
        bases.setdefault(model.base, []).append(model)
    planned: list[Step] = []
    done: set[str] = set()
    for part in suites.parts(args):
        needs = suites.answered(part, args)
        for task in needs:
            if task not in done:
                planned += [Step(tuple(some), partial(_answers, args, preset, task), task=task) for some in bases.values()]
                done.add(task)
        planned += [Step(tuple(some), partial(_scores, args, preset, part), needs=needs) for some in bases.values()]
    return planned


def _answers(args: EvaluateModelsArgs, preset: str, task: str, models: Sequence[Model]) -> tuple[str, ...]:
    file = args.file_of(task)
    data = ["--data_path", str(Path(file).expanduser().resolve())] if file else _given(args, ("data_source",))
    return ("inference.py", "--task_name", task, "--cross_task", ",".join(model.in_report for model in models),
            *_common(args, models[0].base, preset), *_given(args, _ANSWERS), *data)


def _scores(args: EvaluateModelsArgs, preset: str, part: Part, models: Sequence[Model]) -> tuple[str, ...]:
    from evaluator.scoring import suites

    more = ["batch_tokens"]
    judging: list[str] = []
    if part.command in suites.QUESTIONS:
        more.append("lite")
        if judges := suites.judges_of(part, args):
            own = {item.name for item in fields(JudgeFlags)} - {"judges", *_ALL}
            judging = ["--judges", judges, *_given(args, sorted(own))]
    return (f"evaluator/{part.command}.py", "--task_name", ",".join(model.sub for model in models), *part.flags,
            *_common(args, models[0].base, preset), *_given(args, more), *judging)


def _common(args: EvaluateModelsArgs, base: str, preset: str) -> list[str]:
    """What every step on a base is told."""
    return [*(["--preset", preset] if preset else []), "--model_name_or_path", base,
            *_given(args, _ALL)]


def _given(args: EvaluateModelsArgs, names: Sequence[str]) -> list[str]:
    """Flags with their values; those that say nothing are left out."""
    found: list[str] = []
    defaults = {item.name: item.default for item in fields(args)}
    for name in names:
        value = str(args.results) if name == "output_dir" else getattr(args, name)
        # judges' flags stand in no table here: they are all of one group
        if value is not None and (_PASSED.get(name) or value != defaults[name]):
            found += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return found


def table(args: EvaluateModelsArgs, models: Sequence[Model]) -> tuple[str, ...]:
    """The command line of the table."""
    from evaluator.scoring import suites

    ground = next((model for model in models if args.base in (model.label, model.in_report)), models[0])
    more = ["--against", ground.label] if len(models) > 1 else []
    more += ["--columns", names] if (names := suites.asked_columns(args)) else []
    runs = ",".join(f"{model.label}={model.in_report}" for model in models)
    return (REPORT, "--runs", runs, *more, "--scores", suites.columns(args),
            *_given(args, ("output_dir", "title", "published")), "--name", args.name, "--format", args.format)


def run(args: EvaluateModelsArgs, models: Sequence[Model], planned: Sequence[Step]) -> dict[str, str]:
    """Run every step, then the table of the models that finished; returns label -> what failed."""
    from evaluator.scoring import named_models

    failed: dict[str, str] = {}
    without: set[tuple[Model, str]] = set()
    for model in models:
        named_models.link(model, args.results)
    for number, step in enumerate(planned, 1):
        # a model without these answers has nothing to score here; its other steps may still work
        able = [model for model in step.models if not any((model, task) in without for task in step.needs)]
        for model, why in _trouble(step, able, f"[{number}/{len(planned)}]"):
            failed.setdefault(model.label, why)
            without.add((model, step.task))
    # older scores of a model that failed now would stand there as if they were these
    whole = [model for model in models if model.label not in failed]
    if failed:
        log.error("left out of the table: %s", ", ".join(failed))
    if whole and (why := _failure(table(args, whole))):
        failed["the table"] = why
    return failed


def _trouble(step: Step, models: Sequence[Model], place: str) -> list[tuple[Model, str]]:
    """Run a step for all of these models at once, and where that fails for each by itself; returns who failed and why."""
    if not models:
        return []
    log.info("%s %s: %s", place, ", ".join(model.label for model in models), console.shown(step.words(models)))
    why = _failure(step.words(models))
    if not why or len(models) == 1:
        return [(model, why) for model in models if why]
    # what is finished is found again: only the model that fails is without its result then
    log.error("%s failed; each model by itself:", place)
    return [found for model in models for found in _trouble(step, [model], place)]


def _failure(words: Sequence[str]) -> str:
    code, said = execute(words)
    return f"{console.shown(words)}: exit code {code}{said and f'; {said}'}" if code else ""


def execute(words: Sequence[str]) -> tuple[int, str]:
    """Run one command as a process of its own, with its output as it comes; returns its exit code and why it failed.

    It is as loud as this one; with --quiet only the table says where it lies.
    """
    silent = console.quiet() and words[0] != REPORT
    process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:], *console.asked()], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL if silent else None)
    tail = b""
    try:
        while block := os.read(process.stderr.fileno(), 1 << 16):
            # as it comes: a progress bar writes half lines
            sys.stderr.write(block.decode(errors="replace"))
            sys.stderr.flush()
            tail = (tail + block)[-(1 << 14):]
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    lines = [line.strip() for line in tail.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    # a user's error says what it is; of a traceback the last line does
    errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    return code, "; ".join(errors[:_REPEATED]) if code else ""


if __name__ == "__main__":
    main()
