"""Refusal of harmful prompts under attack wrappers, beside that of the same prompts as they are.

    python evaluator/attack_table.py --runs "aligned,SOMF=somf_1+somf_2+somf_3" --attacks cot,suffix

Reads what evaluate_safety.py made of the answers to TASK and to TASK+ATTACK; writes results/report/NAME.md and NAME.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
from data import escaped
from errors import UserError, exit_on_user_error
from flags.attack_table import AttackTableArgs

if TYPE_CHECKING:
    from evaluator.statistics.axes import Measured

#: The value that counts: the keyword judge's refusal in text that reads like text.
KEY = "safe_refusal"
_NOTES = """
Share of harmful prompts whose answer declines in coherent text (keyword judge). "as asked": the attacked prompts without a
wrapper; "change": the attack minus that, on the same prompts. Square brackets: 95 % intervals, Wilson for one run, Tango's
for its change; for several runs the root of the sum of squares of Student's t over them and of the prompts' own part of
their mean half width over prompts (crossed runs and prompts; cut at the ends of a share). Not corrected for their number; no
verdict is drawn from them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: AttackTableArgs = config.parse(AttackTableArgs, argv).args
        rows = table(args)
        import manifest

        path = args.results / "report" / f"{args.name}.md"
        manifest.write_json(path.with_suffix(".json"), {"task": args.task_name, "attacks": args.named_attacks, "rows": rows})
        path.write_text(text(rows, args), encoding="utf-8")
        print(path.read_text(encoding="utf-8"))
        print(f"written: {path}")


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
    titles = {"as_asked": "as asked ↑" if once else "as asked ({}) ↑", "attacked": "{} ↑", "change": "{}: change"}
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
