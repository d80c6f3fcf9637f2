"""What lies in a results folder: its runs, one run and what it was made from, two runs beside each other, all scores.

    python -m evaluator.registry list --filter "kind=adapter"
    python -m evaluator.registry show RUN
    python -m evaluator.registry compare RUN RUN
    python -m evaluator.registry export --format csv,json

Reads results/registry.jsonl, the manifests and the folders; loads no model. Secrets in settings are not shown.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import config
import console
import manifest
from data import escaped
from errors import UserError, exit_on_user_error
from evaluator.reporting import formats
from flags import sub_commands
from flags.registry import CompareArgs, ExportScoresArgs, ListArgs, ShowArgs


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        name, rest = sub_commands.chosen({name: command for name, (command, _, _) in COMMANDS.items()}, argv, __doc__,
                                         "python -m evaluator.registry list")
        command, carry_out, wanted = COMMANDS[name]
        first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
        runs = [word for item in rest[:first] for word in item.split(",") if word]
        parsed = config.parse(command, rest[first:])
        args = parsed.args
        if len(runs) != wanted:
            raise UserError(f"{name}: takes {wanted or 'no'} name{'' if wanted == 1 else 's'} of runs before the flags, not "
                            f"{len(runs)}; python -m evaluator.registry list shows them")
        console.set_up(parsed.verbosity)
        if not args.results.is_dir():
            raise UserError(f"--output_dir: {args.results} does not exist")
        # a name or a manifest of strangers must not move the cursor of a terminal
        console.show(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", carry_out(args, *runs)))


def list_runs(args: ListArgs) -> str:
    """Every run as a line."""
    from evaluator.reporting.run_records import MAIN

    rows = _chosen(args)
    if args.format == "json":
        return formats.dumped(rows)
    cells = [[*(str(row[key]) for key in ("run", "kind", "method", "base")), row["date"][:16],
              "" if row["seed"] is None else str(row["seed"]),
              ", ".join(f"{name} {formats.number(row['scores'][name])}" for name in MAIN if name in row["scores"])]
             for row in rows]
    return "\n".join([*formats.markdown_lines(["run", "kind", "method", "base", "date", "seed", "scores"], cells), "",
                      f"{len(rows)} runs in {args.results}"])


def _chosen(args: Any) -> list[dict[str, Any]]:
    """The records that --filter lets through."""
    from evaluator.reporting import run_records

    rows = [run_records.record(args.results, run) for run in run_records.names(args.results)]
    return manifest.public([row for row in rows if all(
        fnmatch.fnmatchcase(str(row[key] if row[key] is not None else ""), pattern) for key, pattern in args.filters)])


def show(args: ShowArgs, run: str) -> str:
    """One run in full."""
    from evaluator.reporting import run_records

    found = run_records.detail(args.results, run)
    if args.format == "json":
        return formats.dumped(found)
    clean = escaped.markdown
    lines = [f"# {clean(run)}", "", f"- {clean(found['kind'])}{found['method'] and ', made by ' + clean(found['method'])}"
             f"{found['date'] and ', ' + found['date']}, seed {found['seed']}"]
    lines += [f"- {name}: {clean(str(found[name]))}" for name in ("folder", "note") if found.get(name)]
    if found["command_line"]:
        lines.append(f"- command: {clean(' '.join(map(str, found['command_line'])))}")
    lines += [f"- {name}: {clean(said)}" for name, said in (
        ("data", _said(found["data"])), ("settings", _said(found["settings"])), ("packages", _said(found["packages"] or {})),
        ("weights", _said(found["weights"]))) if said]
    lines += ["", "## Made from", "", *(_tree(found["made_from"]) or ["nothing recorded"])]
    lines += ["", "## Answers", "", *formats.markdown_lines(["task", "split", "prompts", "date", "weights"], [
        [str(item[key]) for key in ("task", "split", "prompts", "date", "weights")] for item in found["answers"]])]
    lines += ["", "## Scores", "", *formats.markdown_lines(["score", "value", "n", "command", "date", "rows"], [
        [item["score"], formats.number(item["value"]) + _ends(item), str(item["n"]), item["command"], item["date"],
         item["rows"]] for item in found["scores"]])]
    return "\n".join(lines)


def _ends(score: dict[str, Any]) -> str:
    return formats.interval(*(math.nan if score[end] is None else score[end] for end in ("low", "high")))


def _said(settings: dict[str, Any]) -> str:
    """Settings on one line, without those that are empty."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, "", {}, []))


def _tree(items: Sequence[dict[str, Any]], depth: int = 0) -> list[str]:
    lines = []
    for item in items:
        place = f", {escaped.markdown(item['folder'])}" if item["folder"] else ""
        name, recorded = escaped.markdown(item["name"]), escaped.markdown(str(item["recorded"])[:19])
        lines.append(f"{'  ' * depth}- {name} {recorded}: {item['state']}{place}")
        lines += _tree(item.get("made_from", ()), depth + 1)
    return lines


def compare(args: CompareArgs, first: str, second: str) -> str:
    """Settings that differ, and every score's difference on the same prompts, corrected by Holm."""
    from evaluator.reporting import against, run_records
    from evaluator.reporting.findings import Line
    from evaluator.reporting.table import comparisons, known_axes
    from evaluator.statistics.axes import DISCRIMINATION, secondary
    from evaluator.statistics.comparison import measured

    for run in (first, second):
        run_records.record(args.results, run)  # says which there are
    differ = run_records.differing(args.results, (first, second))
    lines = [Line(run, run, (measured(args.results, run),)) for run in (first, second)]
    known = known_axes([item for line in lines for item in line.found], DISCRIMINATION)
    axes = [axis for axis in known if not secondary(axis)]
    declared = against.outcomes(lines, lines[0], axes)
    if args.format == "json":
        return formats.dumped({"settings": {key: list(values) for key, values in differ.items()},
                               "differences": comparisons(declared, against=first)})
    rows = []
    for axis in axes:
        values = [line.found[0].scores.get(axis.score) for line in lines]
        outcome = declared.get((axis.title, second))
        both = [formats.number(score["value"]) + _ends(score) if score else "" for score in values]
        d = outcome.difference if outcome else None
        rows.append([axis.title, *both, *([formats.number(d.value, sign=True) + formats.interval(d.low, d.high),
                                           formats.p_text(d.p), formats.p_text(outcome.corrected), outcome.verdict]
                                          if d else [""] * 4)])
    heads = ["score", first, second, "second minus first", "p", "Holm", "second is"]
    return "\n".join([
        f"# {escaped.markdown(second)} against {escaped.markdown(first)}", "", "## Settings that differ", "",
        *formats.markdown_lines(["setting", first, second], [[key, str(a), str(b)] for key, (a, b) in differ.items()]),
        "", "## Scores, same prompts", "", *formats.markdown_lines(heads, rows), "",
        f"Square brackets: 95 % intervals. Holm over these {len(declared)} differences; an empty one: no shared prompts, or "
        "judged by another version."])


def export(args: ExportScoresArgs) -> str:
    """Every score of every run, written."""
    from evaluator.reporting.table import of_scores
    from evaluator.statistics.comparison import measured

    found = {row["run"]: measured(args.results, row["run"]) for row in _chosen(args)}
    found = {run: item for run, item in found.items() if item.scores}
    if not found:
        raise UserError(f"{args.results}: no run that is asked for has a score; run evaluator/evaluate.py first")
    table = of_scores(args.name, found)
    folder = args.results / "report"
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name in args.formats:
        paths.append(folder / f"{args.name}{formats.SUFFIXES[name]}")
        page = [f"# {table.title}", "", *formats.markdown(table), ""]
        paths[-1].write_text("\n".join(page) if name == "md" else formats.WRITERS[name](table), encoding="utf-8")
    return "\n".join(f"written: {path}" for path in paths)


#: Sub-command -> its flags, the function that carries it out, how many runs it takes.
COMMANDS: dict[str, tuple[type, Callable[..., str], int]] = {
    "list": (ListArgs, list_runs, 0), "show": (ShowArgs, show, 1), "compare": (CompareArgs, compare, 2),
    "export": (ExportScoresArgs, export, 0)}


if __name__ == "__main__":
    main()
