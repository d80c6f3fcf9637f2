"""scripts/faults.sh: every fault upon every command, and the table of what came of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults import children
from faults.graph import Graph
from faults.trials import Outcome, Trial
from faults.victims import VICTIMS

import config

PAGE = config.ROOT / "docs" / "reliability.md"
MARKS = ("<!-- table of scripts/faults.sh -->\n", "<!-- end of that table -->")
#: Kills of each command in 100: those that train write the most.
KILLS = {"train: sft": 12, "train: full": 9, "train: dpo": 9, "train: mask": 9, "train: moe": 12, "train: soup": 9,
         "fuse: llama_moe": 4, "fuse: adapters": 4, "fuse: merge": 8, "fuse: export": 4, "inference": 6,
         "evaluate_refusal": 4, "evaluate_helpfulness": 4}
GRAPH = 6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bash scripts/faults.sh", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kills", type=int, default=100, help="in all; the share of each command stays")
    parser.add_argument("--only", default="", help=f"commands, commas: {', '.join(VICTIMS)}, graph")
    parser.add_argument("--folder", type=Path, default=None, help="where; empty: a temporary folder, removed at the end")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(config.ROOT)}")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.only.split(",") if name.strip()] or [*VICTIMS, "graph"]
    if unknown := [name for name in names if name not in VICTIMS and name != "graph"]:
        parser.error(f"--only {', '.join(unknown)}: allowed: {', '.join(VICTIMS)}, graph")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="faults"))).resolve()
    begin = time.monotonic()
    outcomes = everything(names, folder, args.kills / 100, args.seed)
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(outcomes, args.seed, time.monotonic() - begin)
    print(text)
    broken = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in broken:
        print(f"\n{outcome.command}, {outcome.fault}:", *outcome.wrong, sep="\n  ", file=sys.stderr)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        PAGE.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
    sys.exit(bool(broken))


def everything(names: Sequence[str], folder: Path, share: float, seed: int) -> list[Outcome]:
    """Every fault upon these commands; with ``share`` of the kills of the long form."""
    children.load()
    place = children.made(folder / "place")
    mounts = children.may_mount()
    if not mounts:
        print("no mounts of its own are allowed here: full disks and read-only folders are left out", file=sys.stderr)
    found: list[Outcome] = []
    for name in names:
        if name == "graph":
            found.append(_told(Graph(place, folder).kill(max(1, round(GRAPH * share)), seed)))
            continue
        trial = Trial(VICTIMS[name], place, folder)
        found.append(_told(trial.kill(max(1, round(KILLS[name] * share)), seed)))
        found += [_told(outcome) for outcome in others(trial, seed, mounts)]
        trial.close()
    return found


def others(trial: Trial, seed: int, mounts: bool) -> list[Outcome]:
    """Every fault but kills."""
    found = [trial.small_files(), trial.twice(), trial.clock(seed)]
    if mounts:
        found += [trial.full_disk(), trial.read_only()]
    return found + ([trial.memory(seed)] if trial.victim.model else [])


def _told(outcome: Outcome) -> Outcome:
    print(json.dumps({"command": outcome.command, "fault": outcome.fault, "times": outcome.times,
                      "wrong": outcome.wrong}), file=sys.stderr, flush=True)
    return outcome


def table(outcomes: Sequence[Outcome], seed: int, seconds: float) -> str:
    """Markdown: a row for each command, a column for each fault; below it what the commands said."""
    faults = list(dict.fromkeys(outcome.fault for outcome in outcomes))
    commands = list(dict.fromkeys(outcome.command for outcome in outcomes))
    cells = {(outcome.command, outcome.fault): outcome for outcome in outcomes}
    kills = sum(outcome.times for outcome in outcomes if outcome.fault == "kill -9")
    broken = sum(bool(outcome.wrong) for outcome in outcomes)
    others = sum(outcome.times for outcome in outcomes) - kills
    rows = [f"{kills} kills and {others} other faults (seed {seed}, {seconds / 60:.0f} minutes on {os.cpu_count()} cores); "
            f"broken rules: {broken}.", "",
            f"| command | {' | '.join(faults)} |", f"| --- |{' --- |' * len(faults)}"]
    for command in commands:
        rows.append(f"| {command} | {' | '.join(_cell(cells.get((command, fault))) for fault in faults)} |")
    said = [f"- {fault}: {next(_short(o.said) for o in outcomes if o.fault == fault and o.said)}" for fault in faults
            if any(o.said for o in outcomes if o.fault == fault)]
    return "\n".join([*rows, "", "What the commands say, one of each:", "", *said, ""])


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.wrong:
        return f"**{len(outcome.wrong)} wrong**"
    if outcome.fault == "kill -9":
        return f"{outcome.times}, same bytes" + (f" ({outcome.whole} when it was done)" if outcome.whole else "")
    return "same bytes"


def _short(said: str) -> str:
    # folders and numbers of this run mean nothing to a reader
    said = re.sub(r"process \d+ on [^\s:]+", "process 4242 on HOST", said)
    return re.sub(r"/[\w./-]*?/(results|disk)(?=[/ :])", "RESULTS", said)


if __name__ == "__main__":
    main()
