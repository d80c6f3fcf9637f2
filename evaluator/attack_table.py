"""Refusal of harmful prompts under attack wrappers, beside that of the same prompts as they are.

    python evaluator/attack_table.py --runs "aligned,SOMF=somf_1+somf_2+somf_3" --attacks cot,suffix

Reads what evaluate_safety.py made of the answers to TASK and to TASK+ATTACK; writes results/report/NAME.md and
NAME.json, or what --format names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
import console
from data import escaped
from errors import UserError, exit_on_user_error
from flags.attack_table import AttackTableArgs

if TYPE_CHECKING:
    from pathlib import Path

    from evaluator.reporting.table import Table
    from evaluator.statistics.axes import Measured

#: The value that counts: the keyword judge's refusal in text that reads like text.
KEY = "safe_refusal"
_TITLES = {"as_asked": "as asked ({}) ↑", "attacked": "{} ↑", "change": "{}: change"}
_NOTES = """
Share of harmful prompts whose answer declines in coherent text (keyword judge). "as asked": the attacked prompts without a
wrapper; "change": the attack minus that, on the same prompts. Square brackets: 95 % intervals, Wilson for one run, Tango's
for its change; for several runs the root of the sum of squares of Student's t over them and of the prompts' own part of
their mean half width over prompts (crossed runs and prompts; cut at the ends of a share). Not corrected for their number; no
verdict is drawn from them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(AttackTableArgs, argv)
        console.set_up(parsed.verbosity)
        args: AttackTableArgs = parsed.args
        rows = table(args)
        shown = text(rows, args)
        paths = write(rows, args, shown)
        console.show_written(shown, paths)


def write(rows: Sequence[dict[str, Any]], args: AttackTableArgs, shown: str) -> list[Path]:
    """Write results/report/NAME in every format that was asked for; ``shown`` is the page."""
    import manifest
    from evaluator.reporting import formats

    folder = args.results / "report"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in args.formats:
        paths.append(folder / f"{args.name}{formats.SUFFIXES[name]}")
        if name == "json":
            manifest.write_json(paths[-1], {"task": args.task_name, "attacks": args.named_attacks, "rows": rows})
        else:
            paths[-1].write_text(shown if name == "md" else formats.WRITERS[name](as_table(rows, args)), encoding="utf-8")
    return paths


def as_table(rows: Sequence[dict[str, Any]], args: AttackTableArgs) -> Table:
    """The rows as a table of the report's kind: for each attack the rate without it, with it, and the change."""
    from evaluator.reporting.table import Column, Row, Table
    from evaluator.statistics.comparison import Cell

    columns = tuple(Column(f"{attack}.{kind}", title.format(attack), True, signed=kind == "change")
                    for attack in args.named_attacks for kind, title in _TITLES.items())
    return Table(f"{args.task_name} under attack", columns, tuple(Row(row["label"], "+".join(row["runs"]), (), {
        f"{attack}.{kind}": Cell(cell["value"], *(math.nan if cell[end] is None else cell[end] for end in ("low", "high")),
                                 cell["n"], ()) for attack, cells in row["cells"].items() for kind, cell in cells.items()})
        for row in rows))


def table(args: AttackTableArgs) -> list[dict[str, Any]]:
    """Every row: {"label", "runs", "cells": {attack: {"as_asked", "attacked", "change"}}}, each {value, low, high, n}.

    Raises:
        UserError: a run was not scored under an attack; names the commands that do it.
    """
    from evaluator.reporting.limits import same_labels, twice
    from evaluator.statistics.comparison import measured

    if same := same_labels("--runs", [label for label, _ in args.rows]) + [
            problem for _, runs in args.rows for problem in twice("--runs", runs)]:
        raise UserError(*same)
    by_run = {run: measured(args.results, run) for _, runs in args.rows for run in runs}
    places = {run: "raw" if run in ("", "base", "raw") else f"cross_{run}" for run in by_run}
    problems = []
    # every command that is missing at once: answering and scoring take hours
    for attack in ("", *args.named_attacks):
        name = f"{args.task_name}+{attack}" if attack else args.task_name
        if absent := [run for run, item in by_run.items() if not any(place == name for place, _ in item.rows)]:
            put = f" --attack {attack}" if attack else ""
            problems.append(f"{', '.join(absent)}: no scores for {name}; run python inference.py --task_name "
                            f"{args.task_name}{put} --cross_task {','.join(absent)} and python evaluator/evaluate_safety.py "
                            f"--harmful_task {name} --task_name {','.join(places[run] for run in absent)}")
    if problems:
        raise UserError(*problems)
    return [{"label": label, "runs": runs, "cells": {
        attack: _cells([by_run[run] for run in runs], args.task_name, attack) for attack in args.named_attacks}}
        for label, runs in args.rows]


def _cells(found: Sequence[Measured], task: str, attack: str) -> dict[str, dict[str, Any]]:
    """Rates with and without the attack on the prompts that have both, and their difference."""
    from evaluator.statistics import metrics

    kinds = ("as_asked", "attacked", "change")
    scores: dict[str, list[Any]] = {kind: [] for kind in kinds}
    by_prompt: dict[str, list[dict[str, int]]] = {kind: [] for kind in kinds}
    for item in found:
        # an attack may have been put to fewer prompts: rates of other prompts do not compare
        both = sorted(id for (place, id), values in item.rows.items() if place == f"{task}+{attack}" and KEY in values
                      and KEY in item.rows.get((task, id), {}))
        if not both:
            raise UserError(f"{item.folder.name}: {task} and {task}+{attack} share no prompt; answer both with one "
                            "--num_samples")
        before, after = ([item.rows[place, id][KEY] for id in both] for place in (task, f"{task}+{attack}"))
        scores["as_asked"].append(metrics.rate(before, "", "", higher_is_better=True))
        scores["attacked"].append(metrics.rate(after, "", "", higher_is_better=True))
        scores["change"].append(metrics.mcnemar(after, before))
        for kind, values in zip(kinds, (before, after, [a - b for a, b in zip(after, before, strict=True)]), strict=True):
            by_prompt[kind].append(dict(zip(both, values, strict=True)))
    return {kind: _cell(scores[kind], by_prompt[kind], -1.0 if kind == "change" else 0.0) for kind in kinds}


def _cell(values: Sequence[Any], by_prompt: Sequence[dict[str, int]], least: float) -> dict[str, Any]:
    """One number over runs, as report.py has it: the rows' interval for one run, crossed runs and prompts for several."""
    from evaluator.statistics import crossed

    ends = [(item.value, item.low, item.high) for item in values]
    value, low, high = crossed.over_seeds(ends, crossed.share_of([by_prompt]))
    low, high = max(low, least), min(high, 1.0)
    known = (None if math.isnan(end) else end for end in (low, high))
    return {"value": value, **dict(zip(("low", "high"), known, strict=True)), "n": values[0].n}


def text(rows: Sequence[dict[str, Any]], args: AttackTableArgs) -> str:
    """The table as Markdown."""
    first = args.named_attacks[0]
    # where all attacks met the same prompts the plain rate is one column, not one for each attack
    once = all(cell["as_asked"] == row["cells"][first]["as_asked"] for row in rows for cell in row["cells"].values())
    columns = [(name, kind) for name in args.named_attacks for kind in ("as_asked", "attacked", "change")
               if kind != "as_asked" or not once or name == first]
    titles = _TITLES | ({"as_asked": "as asked ↑"} if once else {})
    heads = ["model", "prompts", *(titles[kind].format(name) for name, kind in columns)]
    name = escaped.markdown(args.name)
    lines = [f"# {name}: {args.task_name} under attack", "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        sizes = dict.fromkeys(str(cell["as_asked"]["n"]) for cell in row["cells"].values())
        cells = [_said(row["cells"][attack][kind], kind == "change") for attack, kind in columns]
        lines.append("| " + " | ".join([escaped.markdown(row["label"]), "/".join(sizes), *cells]) + " |")
    return "\n".join([*lines, _NOTES])


def _said(cell: dict[str, Any], sign: bool) -> str:
    interval = "" if cell["low"] is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell['value']:{'+' if sign else ''}.3f}{interval}"


if __name__ == "__main__":
    main()
