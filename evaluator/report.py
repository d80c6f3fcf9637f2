"""Write the table, the differences, the findings and the picture from the registry.

    python evaluator/report.py --runs "base,helpful=helpfulness,naive mix=mix,tuned MoE=RUN" --name quickstart
    python evaluator/report.py --runs "base,mine=RUN" --against base --format md,csv,latex,json
    python evaluator/report.py --runs "base,mine=RUN" --html

The last run is the subject, or with --against every run beside that one; every statement in the report is computed, and a
cell that was not measured stays empty.
"""

from __future__ import annotations

import fnmatch
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import console
from errors import UserError, exit_on_user_error
from evaluator.reporting import formats
from evaluator.reporting.findings import Line
from flags import ReportArgs

if TYPE_CHECKING:
    from evaluator.reporting.page import Content
    from evaluator.statistics.axes import Axis


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        words = sys.argv[1:] if argv is None else argv
        parsed = config.parse(ReportArgs, words)
        console.set_up(parsed.verbosity)
        args: ReportArgs = parsed.args
        paths, text = write(args)
        # the screen gets the table and what was found; differences and notes are in the file
        shown = [re.split(r"\n(?=!\[|## )", text, maxsplit=1)[0]]
        shown += ["## Findings" + found.split("## Notes", 1)[0] for found in text.split("\n## Findings", 1)[1:]]
        console.show_written("\n".join(shown), paths)
        if "html" not in args.formats:
            console.advise(("evaluator/report.py", *words, "--html"))


def write(args: ReportArgs) -> tuple[list[Path], str]:
    """Write results/report/NAME.md with NAME.png, or what --format names, and return the files and the page's text.

    Raises:
        UserError: no runs named, a results folder is missing, or none of the runs was scored.
    """
    from evaluator.reporting.figures import tradeoff
    from evaluator.reporting.page import page

    content = gather(args)
    stem, picture = args.results / "report" / args.name, None
    stem.parent.mkdir(parents=True, exist_ok=True)
    if "md" in args.formats:
        points = _points(content.lines, content.axes, args.base)
        picture = tradeoff(points, stem.with_name(f"{args.name}.png"), content.table.title)
    text = page(content, picture.name if picture else "")
    # only these two say more than the table
    more = _more(content) if {"json", "html"} & set(args.formats) else {}
    paths = []
    for name in args.formats:
        paths.append(stem.with_name(args.name + formats.SUFFIXES[name]))
        if name == "html":
            from evaluator.reporting.html.page import html_page

            body = html_page(content, more)
        else:
            body = text if name == "md" else formats.WRITERS[name](content.table, more)
        paths[-1].write_text(body, encoding="utf-8")
    return paths, text


def gather(args: ReportArgs) -> Content:
    """Read the scores of every row, choose the columns, compare.

    Raises:
        UserError: see ``write``.
    """
    from evaluator.reporting.against import reference
    from evaluator.reporting.limits import same_labels, twice, unknown
    from evaluator.reporting.page import Content, conclude
    from evaluator.reporting.table import known_axes, of_lines
    from evaluator.statistics.axes import CORRECTED
    from evaluator.statistics.comparison import measured
    from evaluator.statistics.corrected import with_corrected

    roots = [Path(r.strip()).expanduser().resolve() for r in args.roots.split(",") if r.strip()] or [args.results]
    named = _named(args.runs)
    missing = [f"--roots: {root} does not exist" for root in roots if not root.is_dir()]
    # findings and summary numbers go by the label, and so does whoever reads them
    missing += same_labels("--runs", [label for label, _ in named])
    missing += twice("--roots", map(str, roots))
    missing += [problem for _, runs in named for problem in twice("--runs", runs.split("+"))]
    # a variable that is not set would show the base under another's label
    missing += [f"--runs {label}={runs}: names no run; write LABEL=RUN" for label, runs in named if not all(runs.split("+"))]
    if missing or not named:
        raise UserError(*missing, *([] if named else ["--runs: name the rows, e.g. --runs \"base,safety,raw_moe\""]))
    # for several runs or folders: all runs of all folders, each as a seed of its row
    asked = [axis for axis in CORRECTED if axis.score in args.more_columns]
    lines = [Line(label, runs, tuple(with_corrected(measured(root, run), asked)
                                     for run in runs.split("+") for root in roots)) for label, runs in named]
    if any(item.scores for line in lines for item in line.found) and (wrong := unknown(lines, roots)):
        raise UserError(*wrong)
    axes = [axis for axis in known_axes([item for line in lines for item in line.found], args.more_columns)
            if not args.score_patterns or any(fnmatch.fnmatchcase(axis.score, text) for text in args.score_patterns)]
    # a wide table is read from the left: what most rows lack comes last
    axes.sort(key=lambda axis: 2 * sum(any(axis.score in one.scores for one in line.found) for line in lines) <= len(lines))
    if not axes:
        asked = f" among {args.scores}" if args.scores else ""
        there = sorted({name for line in lines for item in line.found for name in item.scores})
        raise UserError(f"none of {', '.join(run for _, run in named)} has a score{asked} in {', '.join(map(str, roots))}"
                        + (f" that is a column; scored: {', '.join(there)}" if there else
                           "; run the evaluator/evaluate_*.py commands first"))
    ground = reference(lines, args.against) if args.against else None
    return Content(args, roots, lines, axes, of_lines(args.title or args.name, lines, axes),
                   *conclude(lines, axes, args, ground), ground)


def _more(content: Content) -> dict[str, Any]:
    """What a JSON report holds beside the table."""
    from evaluator.reporting.limits import without_model
    from evaluator.reporting.summary_numbers import summary
    from evaluator.reporting.table import differences

    more = {"without_model": {name: dict(zip((axis.score for axis in content.axes), values, strict=True))
                              for name, values in without_model(content.lines, content.axes).items()},
            "differences": differences(content.pairs, content.axes),
            "summary": [{"row": label, **score.as_dict()} for label, cells in summary(
                {line.label: line.found for line in content.lines}).scores.items() for score in cells.values()],
            "findings": {"sentences": content.findings, "comparisons": content.comparisons}}
    if content.args.costs:
        from evaluator.reporting import costs

        more["costs"] = costs.as_data(costs.of_lines(content.lines, content.roots))
    if content.args.published:
        from evaluator.reporting.published_numbers import as_data, published

        more["published"] = as_data(published(content.args.published))
    return more


def _named(text: str) -> list[tuple[str, str]]:
    # from the right: a label may hold "=", a run may not
    pairs = [item.rpartition("=") for item in text.split(",") if item.strip()]
    return [((label or run).strip(), run.strip()) for label, _, run in pairs]


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


if __name__ == "__main__":
    main()
