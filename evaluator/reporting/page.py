"""A report as a Markdown page: the table, the differences, the findings, and the notes that say how to read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from data import escaped
from evaluator.reporting import against, declared
from evaluator.reporting.formats import interval, markdown, markdown_lines, number
from evaluator.reporting.table import Table, comparisons, seed_names

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis
    from evaluator.statistics.metrics import Difference
    from flags import ReportArgs

_BOTH = ("a half width being the root of the sum of squares of Student's t over seeds and of the prompts' own part of the "
         "seeds' mean half width over test rows (crossed seeds and prompts; cut at 0 and 1 for shares); also for the paired "
         "differences.")

#: Kinds of columns that a report has only when asked -> how their intervals and p are made.
_INTERVALS = {
    "auc": "AUCs: DeLong's interval on the logit scale, DeLong's paired test",
    "threshold": "Refusal at 10 % over-refusal: bootstrap over the prompts of both halves, every threshold taken anew",
    "corrected": "Corrected rates: Lang and Reiczigel's interval; a difference keeps the p of the raw one and has the doubt "
                 "about the judge's errors in its interval",
}


@dataclass(frozen=True)
class Content:
    """All that a report says, before it has a format.

    Args:
        ground: the row that every other one is compared with (--against); None: the last row is compared with each other.
        comparisons: those that the findings are made of, with p after the correction; empty where nobody asks for them.
    """

    args: ReportArgs
    roots: Sequence[Path]
    lines: Sequence[Line]
    axes: Sequence[Axis]
    table: Table
    findings: list[str]
    comparisons: list[dict[str, Any]]
    ground: Line | None = None

    @property
    def pairs(self) -> list[tuple[Line, Line]]:
        """(row, the row that it is compared with) of every difference."""
        if self.ground:
            return [(line, self.ground) for line in self.lines if line is not self.ground]
        return [(self.lines[-1], line) for line in self.lines[:-1]]


def page(content: Content, picture: str = "") -> str:
    """The whole page; ``picture``: the file that it shows below the table, empty for none."""
    from evaluator.reporting.limits import without_model

    args, lines, axes = content.args, content.lines, content.axes
    expected = [[f"({name})", *map(number, values)] for name, values in without_model(lines, axes).items()]
    parts = [f"# {escaped.markdown(content.table.title)}", "", *markdown(content.table, expected)]
    if picture:
        parts += ["", f"![safety beside truth or utility]({quote(picture)})"]
    parts += _aggregates(lines)
    if args.costs:
        from evaluator.reporting import costs

        parts += costs.markdown(costs.of_lines(lines, content.roots))
    if args.published:
        from evaluator.reporting import published_numbers

        parts += published_numbers.markdown(published_numbers.published(args.published))
    if any(len(line.found) > 1 for line in lines):
        parts += ["", "## Per seed", "", *_seed_table(lines, axes)]
    if len(lines) > 1:
        heading = f"Every other row minus {escaped.markdown(content.ground.label)}" if content.ground else \
            f"{escaped.markdown(lines[-1].label)} minus each other row"
        parts += ["", f"## {heading}, same prompts", "", *_differences(content)]
        # labels, definitions and folders stand in these sentences: whoever wrote them, they are text
        parts += ["", "## Findings", "", *map(escaped.line, content.findings)]
    parts += ["", "## Notes", "", *map(escaped.line, notes(content)), ""]
    return "\n".join(parts)


def notes(content: Content) -> list[str]:
    """What the columns are, how sure they are, what was left out and where the rows lie: a sentence each."""
    return [*_notes(content), *_pairing_notes(content)]


def conclude(lines: Sequence[Line], axes: Sequence[Axis], args: ReportArgs, ground: Line | None) -> tuple[
        list[str], list[dict[str, Any]]]:
    """The findings in words, and, where they are asked for as data, the comparisons that they are made of.

    Raises:
        UserError: a file of declared comparisons has problems.
    """
    from evaluator.reporting.findings import findings, outcomes, roles
    from evaluator.statistics.axes import secondary

    # another reading of the same answers is no further axis
    counted = [axis for axis in axes if not secondary(axis)]
    if args.declared:
        groups = declared.read(Path(args.declared).expanduser(), lines)
        made = declared.outcomes(groups, axes)
        return declared.findings(groups, axes, made), declared.as_data(made, axes)
    if ground:
        found = against.outcomes(lines, ground, counted)
        return against.findings(lines, ground, counted, found), comparisons(found, against=ground.label)
    who = roles(lines, args.base, args.experts, args.control)
    if not who:
        return ["The rows do not hold a base, an expert and a control, so nothing is concluded here; --against "
                f"{shlex.quote(lines[0].label)} compares every row with that one."], []
    asked = {"json", "html"} & set(args.formats)
    return findings(who, counted), comparisons(outcomes(who, counted), row=lines[-1].label) if asked else []


def _aggregates(lines: Sequence[Line]) -> list[str]:
    """The papers' summary numbers of every row that has the scores they are made from; nothing where no row has."""
    from evaluator.reporting.summary_numbers import summary

    found = summary({line.label: line.found for line in lines})
    if not found.higher:
        return []
    rows = [[label, *(number(cells[name].value) + interval(cells[name].low, cells[name].high) if name in cells else ""
                      for name in found.higher)] for label, cells in found.scores.items()]
    heads = [f"{name} {'↑' if higher else '↓'}" for name, higher in found.higher.items()]
    return ["", "## Summary numbers", "", *markdown_lines(["model", *heads], rows), "", *map(escaped.line, found.notes)]


def _seed_table(lines: Sequence[Line], axes: Sequence[Axis]) -> list[str]:
    rows = []
    for line in lines:
        for seed, item in zip(seed_names(line), line.found, strict=True):
            scores = [item.scores.get(axis.score) for axis in axes]
            rows.append([line.label, seed, *(number(score["value"]) if score else "" for score in scores)])
    return markdown_lines(["model", "seed", *(axis.title for axis in axes)], rows)


def _differences(content: Content) -> list[str]:
    from evaluator.statistics.comparison import over_seeds

    rows = []
    for a, b in content.pairs:
        differences = [(axis, over_seeds(a.found, b.found, axis)) for axis in content.axes]
        other = a if content.ground else b
        rows.append([other.label, *(_says(d, axis) if d else "" for axis, d in differences)])
    return markdown_lines(["row" if content.ground else "against", *(axis.title for axis in content.axes)], rows)


def _says(difference: Difference, axis: Axis) -> str:
    ends = interval(difference.low, difference.high)
    return f"{number(difference.value, sign=True)}{ends} {difference.verdict(axis.higher)}"


def _notes(content: Content) -> list[str]:
    from evaluator.reporting.limits import SAID, beside_rows, detectable, equal_rows, without_model
    from evaluator.statistics.axes import AXES

    lines, axes, roots = content.lines, content.axes, content.roots
    notes = [f"- ({name}): {SAID[name]}; no model, expected values." for name in without_model(lines, axes) if name in SAID]
    # the last of these rows is the one that is in every comparison
    compared = [*(line for line in lines if line is not content.ground), content.ground] if content.ground else lines
    notes += filter(None, (*beside_rows(lines, axes), detectable(compared, axes), equal_rows(compared, axes)))
    for axis in axes:
        scores = [item.scores[axis.score] for line in lines for item in line.found if axis.score in item.scores]
        sizes = sorted({score["n"] for score in scores})
        shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}; rows with unequal n are not comparable"
        judge = f"; judge: {axis.judge}" if axis.judge else ""
        notes.append(f"- {axis.title}: {scores[0]['definition']}{judge} (n = {shown}).")
    absent = [axis.title for axis in AXES if axis not in axes]
    if content.args.scores:
        notes.append(f"- Shown alone (--scores): {content.args.scores}.")
    elif absent:
        notes.append(f"- Not measured here: {', '.join(absent)}.")
    reports = [item.details["judges"] for line in lines for item in line.found if "judges" in item.details]
    if reports:
        from evaluator.reporting.labels_report import corrected_notes

        notes += [*_judge_notes(reports[0], any(axis.score.startswith("fitted-safer") for axis in axes)),
                  *corrected_notes(lines)]
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
    notes += [f"- {text}." for kind, text in _INTERVALS.items() if any(axis.kind == kind for axis in axes)]
    if len(roots) == 1 and any("+" in line.run for line in lines):
        notes.append(f"- Rows of several runs: their mean, {_BOTH}")
    notes.append(f"- Seeds: {', '.join(map(str, seeds)) or 'unknown'}.")
    notes += [f"- {line.label}: {', '.join(_place(item.folder) for item in line.found)}" for line in lines]
    return notes


def _pairing_notes(content: Content) -> list[str]:
    """What the comparisons of the differences and the findings leave out, and why."""
    from evaluator.statistics.pairing import notes

    args, lines, pairs = content.args, content.lines, list(content.pairs)
    if not content.ground:
        experts = {name.strip() for name in args.experts.split(",")}
        base = [line for line in lines if line.run == args.base][:1]
        pairs += [(line, other) for other in base for line in lines[:-1] if line.run in experts]
    return notes(((a.label, a.found, b.label, b.found) for a, b in pairs), content.axes)


def _place(folder: Path) -> str:
    """The folder as seen from the working directory where it lies below it."""
    # a report is read elsewhere too: a path of this machine helps nobody there
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _judge_notes(report: dict[str, Any], compared: bool) -> list[str]:
    from evaluator.reporting.labels_report import own_note

    notes = own_note(report.get("own", {}))
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
