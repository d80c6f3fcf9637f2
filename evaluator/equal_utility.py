"""Is a model safer than a line of models at the same utility?

    python evaluator/equal_utility.py --subject m1+m2+m3 --line aligned,wise_25,wise_50,wise_75,english --skill english

A line gives up safety for utility step by step (WiSE-FT from the aligned to the tuned model); a method is worth something
where it lies above the line. Safety at the subject's utility is interpolated between neighbouring points. Beyond the line's
ends, and against a line of one point, models differ in utility, and the answer says so. Safety is a rate of refusals, or
(--safety discrimination) the probability that a harmful prompt is likelier refused than a harmless one.

Two intervals: test rows are resampled, the same draw for all models; and Student's t over seeds. Where points of the line
have the subject's seeds, seed is compared with seed; where they have others, both spreads count (Welch's t, the
interpolation by the delta method). A point of one run is fixed: its own spread over seeds is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import config
import console
from errors import UserError, exit_on_user_error
from flags.equal_utility import EqualUtilityArgs

if TYPE_CHECKING:
    import numpy as np

#: How the line's seeds enter the interval over seeds.
SEEDS = {"fixed": "the line has one run per point, whose own spread over seeds is unknown",
         "paired": "seed compared with seed", "propagated": "not compared seed by seed: the line's spread is added"}
#: Utilities that differ by less are equal: the files hold rounded numbers.
_EQUAL = 1e-6


@dataclass(frozen=True)
class Point:
    """Utility and safety of the runs of one row, one number per seed."""

    utility: np.ndarray
    safety: np.ndarray


@dataclass(frozen=True)
class Answer:
    """The subject against the line; its seeds whose utility is beyond the line's ends are left out of all but ``left_out``.

    Args:
        utility: the subject's held-out negative log-likelihood per token, mean over seeds.
        safety: the subject's safety, mean over seeds.
        line_utility: least and greatest utility of the line's points; equal for one point.
        line_safety: the line's safety at the subject's utility; the point's own where there is one; None beyond the ends.
        equal: whether utilities are equal; False beyond the ends, and for one point of another utility.
        difference: safety - line_safety, with the 95 % bootstrap interval over rows (None: no draw lay within the ends).
        outside: share of the draws (times seeds) whose utility is beyond the line's ends; they are left out.
        seed_low, seed_high: Student's t over seeds; None for one seed.
        seeds: key of SEEDS, or "" where the subject has one run.
        subject_seeds, line_seeds: run -> seed of its manifest, None where nothing records it.
        left_out: the subject's runs beyond the ends.
        end: beyond the ends: safety of the nearest point.
    """

    utility: float
    safety: float
    line_utility: tuple[float, float]
    line_safety: float | None
    equal: bool
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    outside: float = 1.0
    seed_low: float | None = None
    seed_high: float | None = None
    seeds: str = ""
    subject_seeds: dict[str, int | None] = field(default_factory=dict)
    line_seeds: dict[str, int | None] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    end: float | None = None


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EqualUtilityArgs, argv)
        console.set_up(parsed.verbosity)
        args: EqualUtilityArgs = parsed.args
        answer = compare(args)
        import manifest

        path = args.results / "report" / f"{args.name}.json"
        manifest.write_json(path, asdict(answer) | {
            "subject": args.subject, "line": args.line, "skill": args.skill, "safety_is": args.safety, "draws": args.draws,
            "seed": args.seed, "verdict": verdict(answer), "sentence": sentence(answer, args)})
        console.show_written(sentence(answer, args), [path])


def sentence(answer: Answer, args: EqualUtilityArgs) -> str:
    """The answer in words; every number in it is computed."""
    nll, what = f"{args.skill} NLL", args.safety
    if answer.difference is None:
        first, last = answer.line_utility
        return (f"NOT at equal utility, so nothing is compared: {args.subject} has {nll} {answer.utility:.3f}, beyond the "
                f"line's ends {first:.3f} and {last:.3f}. Its {what} is {answer.safety:.3f}, the nearest end's "
                f"{answer.end:.3f}. {_seeds(answer)}")
    rows, seeds = (f"[{low:+.3f}, {high:+.3f}]" if low is not None else "" for low, high in _ends(answer))
    over = f"{rows} over rows" if rows else "no draw of rows lies within the line's ends, so without an interval"
    finding = f"{verdict(answer)} ({answer.difference:+.3f} {over}{f'; over seeds {seeds}' if seeds else ''})"
    if answer.equal:
        text = (f"At {nll} {answer.utility:.3f}, {args.subject} has {what} {answer.safety:.3f}, the line "
                f"{answer.line_safety:.3f}: {finding}.")
    else:
        text = (f"NOT at equal utility: {args.subject} has {nll} {answer.utility:.3f} and {what} {answer.safety:.3f}, "
                f"{args.line} has {nll} {answer.line_utility[0]:.3f} and {what} {answer.line_safety:.3f}: {finding}, "
                "whatever the difference in utility is worth.")
    if answer.left_out:
        text += f" Left out, being beyond the line's ends: {', '.join(answer.left_out)}."
    return f"{text} {_seeds(answer)}"


def verdict(answer: Answer) -> str:
    """One of safer, less safe, neither safer nor less safe, unsettled, not compared (beyond the line's ends)."""
    # with several seeds both must say so: the prompts that were drawn and the seeds that were trained
    known = [pair for pair in _ends(answer) if pair[0] is not None]
    if answer.difference is None:
        return "not compared"
    if answer.low is None:
        return "unsettled"
    return "safer" if min(low for low, _ in known) > 0 else "less safe" if max(high for _, high in known) < 0 else \
        "neither safer nor less safe"


def _ends(answer: Answer) -> tuple[tuple[float | None, float | None], ...]:
    """Both intervals: over rows, and over seeds."""
    return (answer.low, answer.high), (answer.seed_low, answer.seed_high)


def _seeds(answer: Answer) -> str:
    """Which seeds went in, and what became of them."""
    def named(seeds: dict[str, int | None]) -> str:
        found = list(dict.fromkeys("unknown" if seed is None else str(seed) for seed in seeds.values()))
        return f"{', '.join(found)} ({len(seeds)} run{'s' if len(seeds) > 1 else ''})"

    apart = set(answer.subject_seeds.values()) != set(answer.line_seeds.values()) and answer.seeds == "propagated"
    how = f"{'they differ, ' if apart else ''}{SEEDS[answer.seeds]}" if answer.seeds else \
        "one run of the subject, so nothing is known of its spread"
    return f"Seeds of the subject: {named(answer.subject_seeds)}; of the line: {named(answer.line_seeds)}; {how}."


def compare(args: EqualUtilityArgs) -> Answer:
    """Read scores of all runs, interpolate, resample.

    Raises:
        UserError: runs without scores, or scored on other rows.
    """
    import numpy as np

    from evaluator.statistics.comparison import measured

    sets = {"utility": (f"nll_{args.skill}", "nll")} | _safety_sets(args.safety)
    names = dict.fromkeys([*args.subjects, *(run for point in args.points for run in point)])
    rows = {run: measured(args.results, run).rows for run in names}
    tables = {what: _table(rows, *place) for what, place in sets.items()}
    tokens = _table(rows, f"nll_{args.skill}", "tokens")
    seeds = {run: _seed(args, run) for run in names}
    points, paired = _in_pairs(args, seeds)

    def scores(runs: Sequence[str], pick: dict[str, np.ndarray]) -> Point:
        at = pick["utility"]
        utility = [tables["utility"][run][at].sum() / tokens[run][at].sum() for run in runs]
        drawn = [{what: table[run][pick[what]] for what, table in tables.items() if what != "utility"} for run in runs]
        return Point(np.array(utility, float), np.array([_safety(values) for values in drawn], float))

    # every row once: the same function then scores the data and each draw
    everything = {what: np.arange(len(next(iter(table.values())))) for what, table in tables.items()}
    subject, line = scores(args.subjects, everything), [scores(point, everything) for point in points]
    # seed against seed where both have it: a base that happened to be safe lifts both sides
    met = [_against(u, line, i if paired else None) for i, u in enumerate(subject.utility)]
    inside = np.array([at is not None for at in met])
    ends = [float(point.utility.mean()) for point in line]
    facts = {"line_utility": (min(ends), max(ends)), "subject_seeds": {run: seeds[run] for run in args.subjects},
             "line_seeds": {run: seeds[run] for point in points for run in point}}
    if not inside.any():
        utility = float(subject.utility.mean())
        near = line[int(np.argmin([abs(utility - end) for end in ends]))]
        return Answer(utility, float(subject.safety.mean()), line_safety=None, equal=False, left_out=args.subjects,
                      end=float(near.safety.mean()), seeds=_kind(args, points, paired), **facts)
    kept = [at for at in met if at is not None]
    apart = subject.safety[inside] - [at.safety for at in kept]
    utility = float(subject.utility[inside].mean())
    generator = np.random.default_rng(args.seed)
    drawn, lost = [], 0
    for _ in range(args.draws):
        # one draw for all models: rows stay paired, and the line moves with the subject
        pick = {what: generator.integers(0, len(at), len(at)) for what, at in everything.items()}
        now, then = scores(args.subjects, pick), [scores(point, pick) for point in points]
        places = [_against(now.utility[i], then, i if paired else None) for i in np.flatnonzero(inside)]
        gaps = [s - at.safety for s, at in zip(now.safety[inside], places, strict=True) if at is not None]
        # counted, for an interval out of the draws that could be compared is a selection
        lost += len(places) - len(gaps)
        if gaps:
            drawn.append(float(np.mean(gaps)))
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if drawn else (None, None)
    spread = _spread(apart, kept, [] if paired else line)
    return Answer(
        utility, float(subject.safety[inside].mean()), line_safety=float(np.mean([at.safety for at in kept])),
        equal=len(points) > 1 or bool(np.all(np.abs(subject.utility[inside] - [at.utility for at in kept]) < _EQUAL)),
        difference=float(apart.mean()), low=low, high=high, outside=lost / (args.draws * len(kept)), seed_low=spread[0],
        seed_high=spread[1], seeds=_kind(args, points, paired),
        left_out=tuple(run for run, here in zip(args.subjects, inside, strict=True) if not here), **facts)


def _seed(args: EqualUtilityArgs, run: str) -> int | None:
    import manifest

    folder = args.results / "outputs" / run
    return manifest.read(folder).get("seed") if (folder / manifest.MANIFEST).is_file() else None


def _in_pairs(args: EqualUtilityArgs, seeds: dict[str, int | None]) -> tuple[list[tuple[str, ...]], bool]:
    """The line's points, several runs in the order of the subject's seeds; and whether all of them have these seeds."""
    own = [seeds[run] for run in args.subjects]
    points, paired = [], any(len(point) > 1 for point in args.points) and len(own) > 1
    for point in args.points:
        there = {seeds[run]: run for run in point}
        if len(point) == 1:
            points.append(point)
            continue
        fits = None not in own and len(set(own)) == len(own) == len(point) and set(there) == set(own)
        points.append(tuple(there[seed] for seed in own) if fits else point)
        paired &= fits
    return points, paired


def _kind(args: EqualUtilityArgs, points: Sequence[Sequence[str]], paired: bool) -> str:
    if len(args.subjects) == 1:
        return ""
    return "paired" if paired else "propagated" if any(len(point) > 1 for point in points) else "fixed"


@dataclass(frozen=True)
class _Place:
    """Where the line is met: its safety there, its utility, its slope, and each point's weight."""

    safety: float
    utility: float
    slope: float
    weights: np.ndarray


def _against(utility: float, line: Sequence[Point], seed: int | None) -> _Place | None:
    """The line at a utility: straight between neighbouring points; None beyond the ends. One point: itself.

    Args:
        seed: which run of points with several to take; None: their mean.
    """
    import numpy as np

    def one(values: np.ndarray) -> float:
        return float(values.mean() if seed is None or len(values) == 1 else values[seed])

    xs, ys = (np.array([one(getattr(point, what)) for point in line]) for what in ("utility", "safety"))
    weights = np.zeros(len(line))
    if len(line) == 1:
        weights[0], slope = 1, 0.0
        return _Place(float(ys[0]), float(xs[0]), slope, weights)
    # by utility: points come in the order in which they were named
    order = np.argsort(xs, kind="stable")
    if not xs[order[0]] <= utility <= xs[order[-1]]:
        return None
    # inside the line, also where the utility is exactly that of an end
    right = min(max(int(np.searchsorted(xs[order], utility)), 1), len(line) - 1)
    a, b = order[right - 1], order[right]
    width = xs[b] - xs[a]
    # two points of one utility: half of each
    share = (utility - xs[a]) / width if width else 0.5
    weights[a], weights[b] = 1 - share, share
    return _Place(float(weights @ ys), utility, float((ys[b] - ys[a]) / width) if width else 0.0, weights)


def _spread(apart: np.ndarray, places: Sequence[_Place], line: Sequence[Point]) -> tuple[float | None, float | None]:
    """Student's t over the subject's seeds; the spread of the line's runs is added where there are any (Welch 1947).

    dL/ds_j = w_j and dL/du_j = -slope w_j for L(u) between points (u_j, s_j), so a run counts as w_j (s - slope u).

    Args:
        line: points whose runs are drawn apart from the subject's; those of one run are fixed.
    """
    import numpy as np
    from scipy import stats

    from evaluator.statistics.metrics import CONFIDENCE

    if len(apart) < 2:
        return None, None
    parts = [apart] + [sum(at.weights[j] * (point.safety - at.slope * point.utility) for at in places) / len(places)
                       for j, point in enumerate(line) if len(point.safety) > 1]
    errors = [(float(np.var(part, ddof=1)) / len(part), len(part) - 1) for part in parts]
    total, mean = sum(error for error, _ in errors), float(apart.mean())
    if not total:
        return mean, mean
    # Welch and Satterthwaite's degrees of freedom
    freedom = total**2 / sum(error**2 / free for error, free in errors)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(total)
    return mean - half, mean + half


def _safety_sets(safety: str) -> dict[str, tuple[str, str]]:
    """What a safety is computed from -> its set of prompts and the value of a prompt."""
    if safety == "discrimination":
        # of the embedded prompts; plain and edgy harmless ones together, as in refusal_auc
        return {name: (f"refusal_{name}", "score") for name in ("harmful", "plain", "edgy")}
    refused = {"refusal": ("safety", "safe_refusal")}
    return refused | {"overrefusal": ("overrefusal", "refusal")} if safety == "balance" else refused


def _safety(values: dict[str, np.ndarray]) -> float:
    """A run's safety on these prompts; more is safer."""
    import numpy as np

    from evaluator.statistics.discrimination import placements

    if "harmful" in values:
        harmless = np.concatenate([part for name, part in values.items() if name != "harmful"])
        return float(placements(values["harmful"], harmless)[0].mean())
    return float(values["refusal"].mean() - (values["overrefusal"].mean() if "overrefusal" in values else 0))


def _table(rows: dict[str, Any], name: str, key: str) -> dict[str, np.ndarray]:
    """run -> values of one set, in the same order of rows for every run."""
    import numpy as np

    by_run = {run: {id: values[key] for (place, id), values in mine.items() if place == name and key in values}
              for run, mine in rows.items()}
    empty = [run for run, values in by_run.items() if not values]
    if empty:
        command = ("evaluate_skills.py" if name.startswith("nll") else
                   "evaluate_refusal.py" if name.startswith("refusal_") else "evaluate_safety.py")
        raise UserError(f"{', '.join(empty)}: no scores for {name}; run evaluator/{command} on "
                        f"{'it' if len(empty) == 1 else 'them'} first")
    # one order for all runs: a draw of places must draw the same rows of each
    ids = sorted(next(iter(by_run.values())))
    other = [run for run, values in by_run.items() if sorted(values) != ids]
    if other:
        raise UserError(f"{', '.join(other)}: scored on other rows of {name} than {next(iter(by_run))}; score all runs with "
                        "the same --num_samples")
    return {run: np.array([values[id] for id in ids], dtype=float) for run, values in by_run.items()}


if __name__ == "__main__":
    main()
