"""The tables of a paper made anew by the graph of published command lines, its numbers beside ours.

    bash scripts/paper_tables.sh --paper lora_fusion                               which tables there are
    bash scripts/paper_tables.sh --paper lora_fusion --table lambda_sweep          in miniature, on the embedded default
    bash scripts/paper_tables.sh --paper somf --table 3 --preset somf_wizardlm --dry_run

Arms, cells and tracks are workflow/papers/PAPER.yaml's (workflow/paper_arms.py reads them); how steps run and when they are
finished is the leaderboard's (workflow/leaderboard.py, workflow/records.py). A cell that cannot be made is empty with its
reason. What stands behind ``--`` goes to snakemake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import config
import console
import manifest
import preset_choice
from config import ROOT
from errors import UserError, exit_on_user_error, nearest
from flags.paper_tables import PaperTablesArgs
from workflow import estimate, leaderboard, paper_arms, plan, records

log = logging.getLogger(__name__)
FORMATS = "md,csv,latex,html,json"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        words, theirs = leaderboard.split(argv)
        parsed = config.parse(PaperTablesArgs, words)
        args: PaperTablesArgs = parsed.args
        console.set_up(parsed.verbosity)
        choice = preset_choice.choose(words)
        name = track_of(args, choice)
        track = paper_arms.read(args.paper, name, args.named_files, all_files=args.dry_run,
                                judge=(args.judge_model, args.judge_base_url))
        if args.asked in ((), ("help",)):
            print(listed(args.paper, track))
            return
        tables = chosen(track, args.asked)
        sys.exit(make(args, track, tables, leaderboard.preset_word(choice) if choice.asked else track.preset, theirs))


def track_of(args: PaperTablesArgs, choice: preset_choice.Choice) -> str:
    """The track that was asked for: by --track, else by the preset's name, else the first, in miniature.

    Raises:
        UserError: no such track.
    """
    known = paper_arms.tracks(args.paper)
    if args.track and args.track not in known:
        raise UserError(f"--track {args.track}: no such track of {args.paper}{nearest(args.track, known)}; allowed: "
                        f"{', '.join(known)}")
    by_preset = next((name for name, preset in known.items() if choice.asked and preset == choice.name), "")
    if choice.asked and not (args.track or by_preset) and not choice.name.endswith((".yaml", ".yml")):
        raise UserError(f"--preset {choice.name}: is no preset of {args.paper}'s tables; allowed: "
                        f"{', '.join(known.values())}, or a .yaml file of yours, with --track to run it as published")
    return args.track or by_preset or next(iter(known))


def listed(paper: str, track: paper_arms.Track) -> str:
    """Every table: number, name, title, cells that are made, why others are not; how the other tracks are asked for."""
    lines = [f"tables of {paper}, track {track.name}: --table takes numbers of this list (they are not the paper's) or "
             "names, commas, or all"]
    for number, (name, table) in enumerate(track.tables.items(), 1):
        cells = [cell for row in table.rows.values() for cell in row.values()]
        whys = Counter(cell.why for cell in cells if cell.why)
        made = sum(bool(cell.measure) and not cell.why for cell in cells)
        # one reason for a whole table needs no count
        told = "; ".join(f"{count} empty: {why}" if made or len(whys) > 1 else why for why, count in whys.most_common(3))
        lines.append(f"{number:3}  {name}: {table.title} ({len(table.rows)} row{'s' * (len(table.rows) != 1)}, {made} of "
                     f"{len(cells)} cells made here{': ' * bool(told)}{told}{'; ..' * (len(whys) > 3)})")
    known = paper_arms.tracks(paper)
    return "\n".join([*lines, "tracks: " + ", ".join(name if name == track.name else f"{name} (--preset {preset})"
                                                     for name, preset in known.items())])


def chosen(track: paper_arms.Track, asked: Sequence[str]) -> list[str]:
    """Names of the tables that were asked for, in the paper's order.

    Raises:
        UserError: no such table; lists what there is.
    """
    names = list(track.tables)
    if "all" in asked:
        return names
    found = {names[int(word) - 1] if word.isdigit() and 0 < int(word) <= len(names) else word for word in asked}
    if unknown := [word for word in asked if word not in names and not (word.isdigit() and 0 < int(word) <= len(names))]:
        known = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
        raise UserError(*(f"--table {word}: no such table{nearest(word, names)}; there: {known}; or all, or help"
                          for word in unknown))
    return [name for name in names if name in found]


def make(args: PaperTablesArgs, track: paper_arms.Track, tables: Sequence[str], preset: str, theirs: Sequence[str]) -> int:
    """Plan, run and report; returns the exit code."""
    results = args.results / (args.name or f"{args.paper}_{track.name}")
    scored = track.scored(tables)
    # unknown names are said with the near ones
    wanted = plan.chosen(track.table, args.only_arms, quick=False, more=True) if args.only_arms else list(scored)
    if elsewhere := [name for name in wanted if name not in scored]:
        raise UserError(*(f"--only {name}: no cell of {', '.join(tables)} is of it; there: {', '.join(scored)}"
                          for name in elsewhere))
    judged = ["base"] if any(name.startswith("base.") for arm in wanted for one in scored.get(arm, ())
                           for name in track.table.endpoints[one].after) else []
    names = [name for name in scored if name in {*wanted, *judged}]
    keys = sorted({track.keys[one] for name in names for one in scored[name] if one in track.keys})
    with _as_if_exported(keys if args.dry_run else ()):
        steps = plan.steps(track.table, names, args.seed_numbers, results, preset=preset, scored=scored) if names else []
        steps, costs = estimate.of_base(steps, args, plan.base_of(preset))
    folder = results / "workflow"
    states = records.states(steps, folder, names if args.overwrite else ())
    lines = leaderboard.commands_of(steps, states) if args.dry_run else []
    lost: dict[str, dict[str, None]] = {}
    for name in tables:
        for cell in _cells(track, [name]):
            if cell.why:
                lost.setdefault(cell.why, {})[name] = None
    lines += [f"empty: {why} (in {', '.join(where)})" for why, where in sorted(lost.items())]
    cost = (leaderboard.cost_line(steps, states, costs, args.gpu_gb) if steps else
            "nothing to run: the published numbers alone")
    seeds = f"{len(args.seed_numbers)} seed{'s' * (len(args.seed_numbers) > 1)}"
    told = "\n".join([*lines, f"plan: {len(tables)} table{'s' * (len(tables) > 1)}, {len(names)} models, {seeds}, "
                      + cost])
    console.show(told, None if args.dry_run else "")
    if args.dry_run:
        used = {word for step in steps for word in step.words}
        needs = [why for place, why in track.lacking.items() if place in used]
        needs += [f"needs a key of a judge: export {key}" for key in keys]
        needs += [f"from the hub: {line}" for line in track.hub if steps]
        print("\n".join([*needs, *(f"$ {shlex.join(('python', *report_words(args, name, results)))}" for name in tables)]))
        return 0
    base = plan.base_of(preset) if preset != track.preset else ""
    folder.mkdir(parents=True, exist_ok=True)
    with leaderboard.locked(folder) as lock, console.steps():
        failed = leaderboard.run(steps, states, folder, theirs, lock, args.gpu_gb) if steps else False
        for name in tables:
            manifest.write_json(folder / f"{name}.json", spec(args, track, name, names, results, base))
            words = report_words(args, name, results)
            log.info("$ %s", shlex.join(("python", *words)))
            failed |= subprocess.run([sys.executable, *words, *console.asked()], cwd=ROOT, check=False).returncode != 0
    return int(failed)


@contextlib.contextmanager
def _as_if_exported(keys: Sequence[str]) -> Iterator[None]:
    """Judges' commands refuse to be planned without their keys, and a plan alone asks no judge."""
    os.environ.update(dict.fromkeys(keys, "not-given"))
    try:
        yield
    finally:
        for key in keys:
            del os.environ[key]


def _cells(track: paper_arms.Track, tables: Sequence[str]) -> list[paper_arms.Cell]:
    return [cell for name in tables for row in track.tables[name].rows.values() for cell in row.values()]


def report_words(args: PaperTablesArgs, table: str, results: Path) -> tuple[str, ...]:
    """The command line that writes a table."""
    return ("evaluator/paper_table.py", "--spec", str(results / "workflow" / f"{table}.json"), "--roots",
            ",".join(str(results / f"seed_{seed}") for seed in args.seed_numbers), "--output_dir", str(results), "--name",
            table, "--format", FORMATS)


def spec(args: PaperTablesArgs, track: paper_arms.Track, name: str, made: Sequence[str], results: Path, base: str = ""
         ) -> dict[str, Any]:
    """Which run and score stands in which cell, and why others are empty; scores that steps did not leave are empty too.

    Args:
        base: the base of a preset of the user's; empty: the track's own.
    """
    table = track.tables[name]
    rows = []
    for key, cells in table.rows.items():
        rows.append({"key": list(key), "cells": {column: _cell(args, track, cell, made, results)
                                                 for column, cell in cells.items()}})
    one = len(args.seed_numbers) == 1
    notes = [track.says, f"Made with a preset of its own, not with the track's: the base is {base}." if base else "",
             table.says,
             f"Ours: 95 % intervals over prompts{' alone, of one seed' if one else ' and seeds'}, not corrected for their "
             f"number; {'seed' if one else 'seeds'} {', '.join(map(str, args.seed_numbers))}.",
             _judge_note(args)]
    mark = ", in miniature" if track.miniature else f", {track.name}"
    return {"paper": args.paper, "table": name, "title": f"{args.paper}: {table.title}{mark}", "keys": list(table.keys),
            "columns": list(table.columns), "rows": rows, "notes": [" ".join(note.split()) for note in notes if note]}


def _judge_note(args: PaperTablesArgs) -> str:
    """Which API judge was asked in place of the paper's; empty: the paper's."""
    named = [args.judge_model, f"at {args.judge_base_url}" if args.judge_base_url else ""]
    return f"API judge of safety: {' '.join(filter(None, named))}, in place of the paper's." if any(named) else ""


def _cell(args: PaperTablesArgs, track: paper_arms.Track, cell: paper_arms.Cell, made: Sequence[str], results: Path
          ) -> dict[str, Any]:
    measure = cell.measure
    if cell.why or measure is None:
        return {"why": cell.why, **({"title": measure.title} if measure and measure.title else {})}
    arm, endpoint = track.table.arms[cell.arm], track.table.endpoints[measure.endpoint]
    place = endpoint.makes.format(run=arm.run, folder=arm.folder)
    why = "" if cell.arm in made else "left out by --only"
    if not why and not all((results / f"seed_{seed}" / place).is_file() for seed in args.seed_numbers):
        why = f"a step failed: logs in {results / 'workflow' / 'logs'}"
    return {"run": arm.run, "score": measure.score, "category": cell.category, "scale": measure.scale,
            "offset": measure.offset, "title": measure.title, "why": why}


if __name__ == "__main__":
    main()
