"""Every arm of the leaderboard made and scored by a graph of published command lines, then one table of them.

    bash scripts/leaderboard.sh --dry_run
    bash scripts/leaderboard.sh --seeds 42,43,44 -- --cores 2
    bash scripts/leaderboard.sh --only tuned_moe,mix -- --executor slurm --jobs 20
    bash scripts/leaderboard.sh --durability

The table of arms is workflow/arms.yaml. What stands behind ``--`` goes to snakemake, which runs the steps: as many beside
each other as --cores allows, one thread each; a step that fails stops what needs it and nothing else. A step is finished
when its manifest is there and its settings and inputs are those recorded (workflow/records.py), whatever the time stamps.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import config
import console
import manifest
import preset_choice
from config import ROOT
from errors import UserError, exit_on_user_error
from flags.leaderboard import LeaderboardArgs
from workflow import cluster, commands, comparisons, durability, estimate, plan, records, warm

log = logging.getLogger(__name__)
#: Lanes that the hours of a plan are told for, and run in unless snakemake's words say otherwise.
LANES = 2
#: Settings that take less memory, for steps that do not fit a card; --plan of a step tells how much.
_SMALLER = ("training with --gradient_checkpointing true, --base_quantization nf4 or a lower --per_device_train_batch_size, "
            "a mask with --storage bfloat16 and --granularity block, answers with a lower --batch_size")
#: How loud this command is -> snakemake; else it tells its jobs, not its progress.
_LOUDNESS = {("--quiet",): ("--quiet", "all"), ("--verbose",): ("--verbose",)}
#: Columns of the table beside those that every report has; those that report.py does not know are left out.
COLUMNS = ("refusal_auc", "refusal_auc_plain", "refusal_auc_edgy", "refusal_auc_length", "refusal_at_10",
           "pairs_ranked", "overrefusal_plain", "overrefusal_edgy", "refusal_corrected", "overrefusal_corrected")


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        words, theirs = split(argv)
        parsed = config.parse(LeaderboardArgs, words)
        args: LeaderboardArgs = parsed.args
        console.set_up(parsed.verbosity)
        choice = preset_choice.choose(words)
        table = plan.read(_table_path(args))
        names = (durability.chosen(table, args.only_arms, args.quick) if args.durability else
                 plan.chosen(table, args.only_arms, args.quick, args.more))
        results = args.results / args.name
        preset = preset_word(choice)
        asked = preset if choice.asked else ""
        if args.durability:
            steps = durability.steps(table, names, args.seed_numbers, results, preset=preset, asked=choice.asked,
                                     quick=args.quick)
        else:
            steps = plan.steps(table, names, args.seed_numbers, results, preset=asked, quick=args.quick)
        steps, costs = estimate.of_base(steps, args, plan.base_of(asked))
        folder = results / "workflow"
        states = records.states(steps, folder, names if args.overwrite else ())
        plan_told = told(args, table, names, steps, states, every=args.dry_run, costs=costs)
        console.show(plan_told, None if args.dry_run else "")
        if args.dry_run:
            for words in reports(args, table, names, results):
                print(f"$ {shlex.join(('python', *words))}")
            return
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as lock, console.steps():
            failed = run(steps, states, folder, theirs, lock, args.gpu_gb)
            sys.exit(finish(args, table, names, results, failed, steps))


def split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Our words, and those behind ``--``, which are snakemake's; None reads ``sys.argv``."""
    words = list(sys.argv[1:] if argv is None else argv)
    return (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])


def preset_word(choice: preset_choice.Choice) -> str:
    """A preset as steps take it; one given by path must be found from the folder that they run in."""
    return str(choice.path.resolve()) if choice.name.endswith((".yaml", ".yml")) else choice.name


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """One run of a graph at a time; gives the lock's file descriptor, for ``run``.

    Raises:
        UserError: another one is under way.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another run of this graph is under way; wait for it, or choose another --name"
                            ) from None
        yield lock.fileno()


def _table_path(args: LeaderboardArgs) -> Path:
    path = Path(args.arms).expanduser()
    return path if path.is_file() else ROOT / path


def told(args: LeaderboardArgs, table: plan.Table, names: Sequence[str], steps: Sequence[plan.Step],
         states: dict[str, str], *, every: bool, costs: str = "measured on the embedded default") -> str:
    """The plan in words: with ``every`` each command; at the end rows, steps, hours and memory of what is to do.

    Args:
        costs: what hours and memory rest on.
    """
    rows = sum(table.arms[name].shown for name in names)
    lines = commands_of(steps, states) if every else []
    lines += [f"left out: {name}, because {file} is not there" for name, file in plan.missing_commands(table).items()]
    seeds = f"{len(args.seed_numbers)} seed{'s' * (len(args.seed_numbers) > 1)}"
    return "\n".join([*lines, f"plan: {rows} rows, {seeds}, {cost_line(steps, states, costs, args.gpu_gb)}"])


def commands_of(steps: Sequence[plan.Step], states: dict[str, str]) -> list[str]:
    """A line for each command."""
    return [f"$ {shlex.join(('python', *step.words))}{'  # finished' * (states[step.name] == records.DONE)}"
            for step in steps]


def lanes_of(steps: Sequence[plan.Step]) -> int:
    """Steps beside each other unless snakemake's words say otherwise: one, where a step fills a card."""
    return LANES if all(step.gpu_gb < 8 for step in steps) else 1


def cost_line(steps: Sequence[plan.Step], states: dict[str, str], costs: str, gpu_gb: float) -> str:
    """Steps, hours and memory of what is to do, and what these rest on."""
    to_do = [step for step in steps if states[step.name] != records.DONE]
    seconds = sum(step.seconds for step in to_do)
    # no lane can be faster than the longest chain of steps that need each other
    way: dict[Path, float] = {}
    for step in steps:
        own = 0.0 if states[step.name] == records.DONE else step.seconds
        way[step.makes] = own + max((way.get(path, 0.0) for path in step.needs), default=0.0)
    lanes = lanes_of(steps)
    hours = max(seconds / lanes, max(way.values(), default=0.0)) / 3600
    memory = sum(sorted((step.memory_mb for step in to_do), reverse=True)[:lanes]) / 1024
    largest = max(to_do, key=lambda step: step.gpu_gb, default=None)
    card = largest is not None and largest.gpu_gb > 0
    unit = "card" if card else "core"
    told = (f"{len(steps)} steps, {len(to_do)} to do: {seconds / 3600:.1f} hours of one {unit}"
            + (f", about {hours:.1f} on {lanes}" if lanes > 1 else "") + f", {memory:.1f} GB of memory at most"
            + (f", {largest.gpu_gb:.1f} GB of the card's ({largest.name})" if card else "")
            + f", {sum(step.disk_mb for step in to_do) / 1024:.1f} GB on disk ({costs})")
    tight = [step for step in to_do if step.gpu_gb > gpu_gb]
    return told + (f"\ntoo large for a card of {gpu_gb:g} GB: {', '.join(step.name for step in tight[:5])}"
                   f"{' ..' * (len(tight) > 5)}; smaller by a preset of yours: {_SMALLER}" if tight else "")


def run(steps: Sequence[plan.Step], states: dict[str, str], folder: Path, theirs: Sequence[str], lock: int,
        card_gb: float) -> bool:
    """Write the plan down and let snakemake run it; whether anything failed.

    Args:
        lock: of ``locked``. snakemake holds it too: where this process alone is killed, the steps under way go on with it.
    """
    if cluster.asked(theirs):
        theirs = [*cluster.words(theirs, folder), *theirs]
        if cluster.cancel_orphans(folder):
            # what they finished while nobody looked
            states = {name: new if states[name] == records.NEW else states[name]
                      for name, new in records.states(steps, folder).items()}
    # a fork saves a step its imports; the first ones would wait for them all the same
    many = sum(states[step.name] != records.DONE for step in steps) > LANES
    with warm.started() if many and not cluster.asked(theirs) and warm.possible() else contextlib.nullcontext() as forks:
        door, life = forks or (None, None)
        words = prepare(steps, states, folder, theirs, card_gb, door)
        return until_it_ends(words, (lock,) if life is None else (lock, life)) != 0


def until_it_ends(words: Sequence[str], kept_open: tuple[int, ...]) -> int:
    """The exit code of snakemake; SIGTERM to this process goes on to it, which then ends what runs and starts no more.

    Args:
        kept_open: file descriptors that it inherits.
    """
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, pass_fds=kept_open) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def prepare(steps: Sequence[plan.Step], states: dict[str, str], folder: Path, theirs: Sequence[str],
            card_gb: float = 80.0, door: Path | None = None) -> list[str]:
    """Write the plan that workflow/Snakefile reads; returns snakemake's command line.

    Args:
        door: of ``warm.started``: steps run as forks of the process behind it.
    """
    start = (sys.executable, *(("-m", "workflow.warm", str(door)) if door else ()))
    logs, path = folder / "logs", folder / "plan.json"
    marks = {step.makes: str(records.mark_path(folder, step.name)) for step in steps}
    records.mark(steps, states, folder)
    written = []
    for step in steps:
        # what has no such flag writes its files anew whenever it is run
        anew = states[step.name] == records.OUTDATED and hasattr(commands.parse(step.words).args, "overwrite")
        words = (*start, *step.words, *(["--overwrite"] if anew else []))
        record = (sys.executable, "-m", "workflow.records", "--plan", str(path), "--step", step.name)
        written.append(asdict(step) | {
            "makes": str(step.makes), "made_of": [str(need) for need in step.needs], "mark": marks[step.makes],
            "needs": [marks.get(need, str(need)) for need in step.needs], "log": str(logs / f"{step.name}.log"),
            "command": f"cd {shlex.quote(str(ROOT))} && {shlex.join(words)} && {shlex.join(record)}",
            **cluster.resources(step, card_gb),
            # braces are snakemake's own
            "message": shlex.join(("python", *step.words)).replace("{", "{{").replace("}", "}}")})
    manifest.write_json(path, {"targets": [step["mark"] for step in written], "steps": written})
    # a profile of a cluster has its own number
    lanes = cluster.asked(theirs) or any(word.partition("=")[0] in ("--cores", "-c", "--jobs", "-j") for word in theirs)
    # its own ways to tell what is finished are switched off: a step without its mark runs
    return [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"),
            "--directory", str(folder), "--config", f"plan={path}", "--rerun-triggers", "params", "--drop-metadata",
            "--ignore-incomplete", "--nolock", "--scheduler", "greedy", "--keep-going",
            *_LOUDNESS.get(tuple(console.asked()), ("--quiet", "progress")), "--show-failed-logs",
            *([] if lanes else ["--cores", str(lanes_of(steps))]), *theirs]


def finish(args: LeaderboardArgs, table: plan.Table, names: Sequence[str], results: Path, failed: bool,
           steps: Sequence[plan.Step]) -> int:
    """The table of the rows that have all of their scores, in every seed; returns the exit code."""
    lacking = {step.arm for step in steps if not step.makes.is_file()}
    whole = [name for name in names if table.arms[name].shown and (
        name not in lacking if args.durability else _scored(table, name, args, results))]
    if lost := [name for name in names if table.arms[name].shown and name not in whole]:
        log.error("left out of the table, because a step failed or was not asked for: %s; logs: %s", ", ".join(lost),
                  results / "workflow" / "logs")
    if table.comparisons and not args.durability:
        manifest.write_json(declared_file(results), comparisons.resolved(table.comparisons, table.arms, whole))
    for words in reports(args, table, whole, results) if whole and table.endpoints else ():
        log.info("$ %s", shlex.join(("python", *words)))
        failed |= subprocess.run([sys.executable, *words, *console.asked()], cwd=ROOT, check=False).returncode != 0
    return int(failed)


def _scored(table: plan.Table, name: str, args: LeaderboardArgs, results: Path) -> bool:
    arm, absent = table.arms[name], plan.missing_commands(table)
    wanted = [endpoint.makes.format(run=arm.run, folder=arm.folder) for endpoint in table.endpoints.values()
              if endpoint.name not in absent and (endpoint.rows == "all" or arm.key)]
    wanted += [f"outputs/{arm.run}/{manifest.MANIFEST}"] if arm.make else []
    return all((results / f"seed_{seed}" / place).is_file() for seed in args.seed_numbers for place in wanted)


def declared_file(results: Path) -> Path:
    """Where the declared comparisons of the rows of the table lie."""
    return results / "workflow" / "comparisons.json"


def reports(args: LeaderboardArgs, table: plan.Table, names: Sequence[str], results: Path) -> list[tuple[str, ...]]:
    """The command lines that write what all of this was for."""
    roots = [results / f"seed_{seed}" for seed in args.seed_numbers]
    return durability.report_words(table, names, roots, results, args.quick) if args.durability else [
        report_words(args, table, names, results)]


def report_words(args: LeaderboardArgs, table: plan.Table, names: Sequence[str], results: Path) -> tuple[str, ...]:
    """The command line of the table: every row against joint training."""
    from flags.evaluate import COLUMNS as KNOWN

    arms = [table.arms[name] for name in names if table.arms[name].shown]
    columns = [name for name in COLUMNS if name in KNOWN]
    joint = next((arm for arm in arms if arm.name == "mix"), None)
    # a few rows of many may have nothing to be compared with
    declared = comparisons.resolved(table.comparisons, table.arms, names)
    return ("evaluator/report.py", "--runs", ",".join(f"{arm.label}={arm.run}" for arm in arms),
            "--roots", ",".join(str(results / f"seed_{seed}") for seed in args.seed_numbers), "--output_dir", str(results),
            "--name", args.name, "--title", "Leaderboard", "--experts",
            ",".join(arm.run for arm in arms if arm.kind == "expert") or "none", "--columns", ",".join(columns),
            *(("--against", joint.label) if joint else ()),
            *(("--declared", str(declared_file(results))) if declared else ()),
            "--costs", "true", "--format", "md,csv,latex,html,json")


if __name__ == "__main__":
    main()
