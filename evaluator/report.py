"""Write the table, the differences, the findings and the picture from the registry.

    python evaluator/report.py --runs "base,helpful=helpfulness,naive mix=mix,tuned MoE=RUN" --name quickstart

The last run is the subject; every statement in the report is computed, and a cell that was not measured stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import config
from data import escaped
from errors import UserError, exit_on_user_error
from evaluator.reporting.findings import Line
from flags import ReportArgs

if TYPE_CHECKING:
    from evaluator.statistics.axes import Axis
    from evaluator.statistics.metrics import Difference


_BOTH = ("a half width being the root of the sum of squares of Student's t over seeds and of the prompts' own part of the "
         "seeds' mean half width over test rows (crossed seeds and prompts; cut at 0 and 1 for shares); also for the paired "
         "differences.")


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: ReportArgs = config.parse(ReportArgs, argv).args
        path = write(args)
        # the screen gets the table and what was found; differences and notes are in the file
        content = path.read_text(encoding="utf-8")
        print(content.split("\n![", 1)[0])
        print("## Findings" + content.split("## Findings", 1)[-1].split("## Notes", 1)[0])
        print(f"written: {path}")


def write(args: ReportArgs) -> Path:
    """Write results/report/NAME.md and NAME.png and return the first.

    Raises:
        UserError: no runs named, a results folder is missing, or none of the runs was scored.
    """
    from evaluator.reporting.figures import tradeoff
    from evaluator.reporting.limits import same_labels, twice
    from evaluator.statistics.axes import AXES, SECONDARY, UTILITY_AXES, judge_axes, set_axes
    from evaluator.statistics.comparison import cell, measured

    roots = [Path(r.strip()).expanduser().resolve() for r in args.roots.split(",") if r.strip()] or [args.results]
    named = _named(args.runs)
    missing = [f"--roots: {root} does not exist" for root in roots if not root.is_dir()]
    # findings and summary numbers go by the label, and so does whoever reads them
    missing += same_labels("--runs", [label for label, _ in named])
    missing += twice("--roots", map(str, roots))
    missing += [problem for _, runs in named for problem in twice("--runs", runs.split("+"))]
    if missing or not named:
        raise UserError(*missing, *([] if named else ["--runs: name the rows, e.g. --runs \"base,safety,raw_moe\""]))
    # for several runs or folders: all runs of all folders, each as a seed of its row
    lines = [Line(label, runs, tuple(measured(root, run) for run in runs.split("+") for root in roots))
             for label, runs in named]
    # a judge's rate is a column, the mean of its number stays in the score files
    judged = judge_axes(item for line in lines for item in line.found)
    other_sets = set_axes(item for line in lines for item in line.found)
    asked = [axis for axis in SECONDARY if axis.score in args.more_columns]
    known = [*AXES[:3], *other_sets, *asked, *AXES[3:], *UTILITY_AXES, *(axis for axis in judged if axis.kind != "scale")]
    # a column that no row has would only make the table wider
    axes = [axis for axis in known if any(cell(line.found, axis) for line in lines)]
    if not axes:
        raise UserError(f"none of {', '.join(run for _, run in named)} has a score in "
                        f"{', '.join(map(str, roots))}; run the evaluator/evaluate_*.py commands first")
    path = args.results / "report" / f"{args.name}.md"
    drawn = tradeoff(_points(lines, axes, args.base), path.with_suffix(".png"), args.title or args.name)
    parts = [f"# {escaped.markdown(args.title or args.name)}", "", *_table(lines, axes)]
    if drawn:
        parts += ["", f"![safety beside truth or utility]({quote(drawn.name)})"]
    parts += _aggregates(lines)
    if args.published:
        from evaluator.reporting.published_numbers import markdown, published

        parts += markdown(published(args.published))
    if any(len(line.found) > 1 for line in lines):
        parts += ["", "## Per seed", "", *_seed_table(lines, axes)]
    if len(lines) > 1:
        parts += ["", f"## {escaped.markdown(lines[-1].label)} minus each other row, same prompts", "",
                  *_differences(lines, axes)]
        # labels, definitions and folders stand in these sentences: whoever wrote them, they are text
        parts += ["", "## Findings", "", *map(escaped.line, _findings(lines, axes, args))]
    parts += ["", "## Notes", "", *map(escaped.line, [*_notes(lines, axes, roots), *_pairing_notes(lines, axes, args)]), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _aggregates(lines: Sequence[Line]) -> list[str]:
    """The papers' summary numbers of every row that has the scores they are made from; nothing where no row has."""
    from evaluator.reporting.summary_numbers import summary

    found = summary({line.label: line.found for line in lines})
    if not found.higher:
        return []
    rows = [[label, *(_number(cells[name].value) + _interval(cells[name].low, cells[name].high) if name in cells else ""
                      for name in found.higher)] for label, cells in found.scores.items()]
    heads = [f"{name} {'↑' if higher else '↓'}" for name, higher in found.higher.items()]
    return ["", "## Summary numbers", "", *_markdown(["model", *heads], rows), "",
            *map(escaped.line, found.notes)]


def _named(text: str) -> list[tuple[str, str]]:
    # from the right: a label may hold "=", a run may not
    pairs = [item.rpartition("=") for item in text.split(",") if item.strip()]
    return [((label or run).strip(), run.strip()) for label, _, run in pairs]


def _number(value: float | None, sign: bool = False) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{'+' if sign else ''}.3f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:.3f}, {high:.3f}]"


def _table(lines: Sequence[Line], axes: Sequence[Axis]) -> list[str]:
    from evaluator.reporting.limits import without_model
    from evaluator.statistics.comparison import cell

    rows = []
    for line in lines:
        cells = []
        for axis in axes:
            score = cell(line.found, axis)
            known = [value for value in score.per_seed if value is not None] if score else []
            # a mean over fewer seeds must not look like one over all
            partial = f" ({len(known)} of {len(line.found)} seeds)" if score and len(known) < len(line.found) else ""
            cells.append(_number(score.value) + _interval(score.low, score.high) + partial if score else "")
        rows.append([line.label, *cells])
    rows += [[f"({name})", *map(_number, values)] for name, values in without_model(lines, axes).items()]
    return _markdown(["model", *(axis.title for axis in axes)], rows)


def _seed_table(lines: Sequence[Line], axes: Sequence[Axis]) -> list[str]:
    rows = []
    for line in lines:
        for number, item in enumerate(line.found):
            seed = item.folder.name if "+" in line.run else \
                f"seed {item.seed}" if item.seed is not None else f"folder {number + 1}"
            scores = [item.scores.get(axis.score) for axis in axes]
            rows.append([line.label, seed, *(_number(score["value"]) if score else "" for score in scores)])
    return _markdown(["model", "seed", *(axis.title for axis in axes)], rows)


def _differences(lines: Sequence[Line], axes: Sequence[Axis]) -> list[str]:
    from evaluator.statistics.comparison import over_seeds

    last, rows = lines[-1], []
    for line in lines[:-1]:
        differences = [(axis, over_seeds(last.found, line.found, axis)) for axis in axes]
        rows.append([line.label, *(_says(d, axis) if d else "" for axis, d in differences)])
    return _markdown(["against", *(axis.title for axis in axes)], rows)


def _says(difference: Difference, axis: Axis) -> str:
    interval = _interval(difference.low, difference.high)
    return f"{_number(difference.value, sign=True)}{interval} {difference.verdict(axis.higher)}"


def _findings(lines: Sequence[Line], axes: Sequence[Axis], args: ReportArgs) -> list[str]:
    """What the last run gains and costs against each control."""
    from evaluator.reporting.findings import findings, roles
    from evaluator.statistics.axes import secondary

    who = roles(lines, args.base, args.experts, args.control)
    # another reading of the same answers is no further axis
    return findings(who, [axis for axis in axes if not secondary(axis)]) if who else [
        "The rows do not hold a base, an expert and a control, so nothing is concluded here."]


def _notes(lines: Sequence[Line], axes: Sequence[Axis], roots: Sequence[Path]) -> list[str]:
    from evaluator.reporting.limits import SAID, beside_rows, detectable, equal_rows, without_model
    from evaluator.statistics.axes import AXES

    notes = [f"- ({name}): {SAID[name]}; no model, expected values." for name in without_model(lines, axes) if name in SAID]
    notes += filter(None, (*beside_rows(lines, axes), detectable(lines, axes), equal_rows(lines, axes)))
    for axis in axes:
        scores = [item.scores[axis.score] for line in lines for item in line.found if axis.score in item.scores]
        sizes = sorted({score["n"] for score in scores})
        shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}; rows with unequal n are not comparable"
        judge = f"; judge: {axis.judge}" if axis.judge else ""
        notes.append(f"- {axis.title}: {scores[0]['definition']}{judge} (n = {shown}).")
    absent = [axis.title for axis in AXES if axis not in axes]
    if absent:
        notes.append(f"- Not measured here: {', '.join(absent)}.")
    reports = [item.details["judges"] for line in lines for item in line.found if "judges" in item.details]
    if reports:
        notes += _judge_notes(reports[0], any(axis.score.startswith("fitted-safer") for axis in axes))
    by_run: dict[str, list[str]] = {}
    for line in lines:
        by_run.setdefault(line.run, []).append(line.label)
    if again := [f"{run} ({', '.join(labels)})" for run, labels in by_run.items() if len(labels) > 1]:
        notes.append(f"- One run under several labels: {'; '.join(again)}.")
    seeds = sorted({item.seed for line in lines for item in line.found if item.seed is not None})
    notes.append("- Square brackets: 95 % intervals. " + (
        "Wilson for rates, percentile bootstrap over rows for means; differences on the same prompts: Tango's interval and "
        "exact McNemar for rates, paired bootstrap for means; refusal − over-refusal by adding both intervals in quadrature."
        if len(roots) == 1 else
        f"Mean over {len(roots)} seeds, {_BOTH}")
        + " They and the verdicts of the differences are not corrected for their number; the findings are.")
    if len(roots) == 1 and any("+" in line.run for line in lines):
        notes.append(f"- Rows of several runs: their mean, {_BOTH}")
    notes.append(f"- Seeds: {', '.join(map(str, seeds)) or 'unknown'}.")
    notes += [f"- {line.label}: {', '.join(_place(item.folder) for item in line.found)}" for line in lines]
    return notes


def _pairing_notes(lines: Sequence[Line], axes: Sequence[Axis], args: ReportArgs) -> list[str]:
    """What the comparisons of the differences and the findings leave out, and why."""
    from evaluator.statistics.pairing import notes

    experts = {name.strip() for name in args.experts.split(",")}
    base = [line for line in lines if line.run == args.base][:1]
    pairs = [(lines[-1], line) for line in lines[:-1]]
    pairs += [(line, other) for other in base for line in lines[:-1] if line.run in experts]
    return notes(((a.label, a.found, b.label, b.found) for a, b in pairs), axes)


def _place(folder: Path) -> str:
    """The folder as seen from the working directory where it lies below it."""
    # a report is read elsewhere too: a path of this machine helps nobody there
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _judge_notes(report: dict[str, Any], compared: bool) -> list[str]:
    notes = []
    for name, title in (("openings", "Keyword judge"), ("published", "Published keyword rule")):
        if _has(found := report.get("keyword", {}).get(name), "n", "missed", "false_alarms"):
            notes.append(f"- {title} against {found['n']} human labels: misses {found['missed']}, false alarms "
                         f"{found['false_alarms']} (the labels also count off-topic answers as refusals).")
    if _has(found := report.get("harm"), "auc", "auc_rated", "missed", "false_alarms", "protocol"):
        notes.append(f"- Harm judge (fitted, secondary): AUC {found['auc']} overall, {found['auc_rated']} on "
                     f"human-rated answers; misses {found['missed']}, false alarms {found['false_alarms']}; "
                     f"{found['protocol']}.")
        if compared and _has(pairs := found.get("pairs"), "right", "wrong", "prompts", "pairs"):
            notes.append(f"- fitted-safer orders two answers to one prompt as people did in {pairs['right']} of the cases, "
                         f"the other way round in {pairs['wrong']}, the rest are ties (means over {pairs['prompts']} "
                         f"prompts, {pairs['pairs']} pairs).")
    return notes


def _has(found: Any, *keys: str) -> bool:
    # a file of another version, or of somebody else, may hold less
    return isinstance(found, dict) and set(keys) <= set(found)


def _points(lines: Sequence[Line], axes: Sequence[Axis], base: str) -> list[dict[str, Any]]:
    """What the picture shows: refusal across; up MC2, else the true/false pairs, else a task's likelihood.

    Rows share the prompts of a likelihood, and its interval over prompts is far wider than any difference between them: the
    picture has the paired difference to the base row.
    """
    from evaluator.statistics.axes import AXES
    from evaluator.statistics.comparison import cell, over_seeds

    named = {axis.score: axis for axis in AXES}
    up = next((axis for axis in axes if axis.score in ("mc2", "factual")), None)
    origin = next((line for line in lines if line.run == base), None)
    tasks = [axis for axis in axes if axis.kind == "ratio" and origin and cell(origin.found, axis)]
    task = next((axis for axis in tasks if axis.score == f"nll_{base}"), tasks[0] if tasks else None)
    points = []
    for line in lines:
        x, over = cell(line.found, named["safe_refusal"]), cell(line.found, named["overrefusal"])
        point: dict[str, Any] = {"label": line.label, "over": over.value if over else None}
        if up is None and task and origin:
            y = over_seeds(line.found, origin.found, task)
            point |= {"y_name": f"{task.title[:-2]} minus {origin.label}'s, same rows (lower is better)", "y_falls": True}
        else:
            y = cell(line.found, up) if up else None
            point["y_name"] = f"{'MC2' if up and up.score == 'mc2' else 'true/false pairs'} (higher is better)"
        for axis, found in (("x", x), ("y", y)):
            # JSON-like values for the picture: it leaves out what is None
            ends = (found.low, found.high) if found and not math.isnan(found.low) else (None, None)
            point |= {axis: found.value if found else None, f"{axis}_low": ends[0], f"{axis}_high": ends[1]}
        points.append(point)
    return points


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(escaped.markdown, row)) + " |" for row in body]


if __name__ == "__main__":
    main()
