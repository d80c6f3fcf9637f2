"""What a report concludes: the last row against each control on every axis, gains and costs alike, corrected by Holm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluator.statistics.axes import Axis, Measured
    from evaluator.statistics.metrics import Difference


@dataclass(frozen=True)
class Line:
    """One row of the table: its label, its run (or runs, a+b+c), and what each results folder (seed) knows of each."""

    label: str
    run: str
    found: tuple[Measured, ...]


@dataclass(frozen=True)
class Roles:
    """Who is who among the rows of a table: every row that is neither base nor expert nor the last one is a control."""

    subject: Line
    base: Line
    experts: tuple[Line, ...]
    controls: tuple[Line, ...]


@dataclass(frozen=True)
class Outcome:
    """One declared comparison; ``corrected`` is its p after Holm's correction over all of them."""

    difference: Difference
    corrected: float
    higher: bool

    @property
    def uncorrected(self) -> str:
        return self.difference.verdict(self.higher)

    @property
    def verdict(self) -> str:
        from evaluator.statistics.metrics import CONFIDENCE

        # nothing is better or worse after the correction that was not before it
        return self.uncorrected if self.corrected <= 1 - CONFIDENCE else "no difference"

    @property
    def hidden_harm(self) -> bool:
        """Whether the correction took a harm away: it guards against claims, and must not hide the first sign of harm."""
        return self.uncorrected == "worse" != self.verdict

    def as_data(self) -> dict[str, Any]:
        """The outcome for a program."""
        d = self.difference
        return {"value": d.value, "low": d.low, "high": d.high, "p": d.p, "p_holm": self.corrected, "verdict": self.verdict,
                "uncorrected": self.uncorrected}


def roles(lines: Sequence[Line], base: str, experts: str, control: str) -> Roles | None:
    """Who is who; None where a base, an expert or a control is missing. ``control``: runs that are named first."""
    names = {name.strip() for name in experts.split(",")}
    first = [name.strip() for name in control.split(",") if name.strip()]
    ground = next((line for line in lines if line.run == base), None)
    found = tuple(line for line in lines[:-1] if line.run in names)
    # everything that is neither base nor expert is a control: none can be left out by forgetting to name it
    others = [line for line in lines[:-1] if line is not ground and line not in found]
    controls = tuple(sorted(others, key=lambda line: line.run not in first))
    return Roles(lines[-1], ground, found, controls) if ground and found and controls else None


def outcomes(who: Roles, axes: Sequence[Axis]) -> dict[tuple[str, str], Outcome]:
    """(axis score, control label) -> outcome of every comparison that can be made; they are one family for Holm."""
    from evaluator.statistics.comparison import over_seeds
    from evaluator.statistics.metrics import holm

    found = {(axis.score, line.label): (d, axis.higher) for axis in axes for line in who.controls
             if (d := over_seeds(who.subject.found, line.found, axis))}
    corrected = holm([d.p for d, _ in found.values()])
    return {key: Outcome(d, p, higher) for (key, (d, higher)), p in zip(found.items(), corrected, strict=True)}


def findings(who: Roles, axes: Sequence[Axis]) -> list[str]:
    """A line for each axis, then the sums over all axes against each control.

    An axis is a gain where an expert, or the fused model itself, improves on the base: there the question is whether
    the fused model beats the control. Everywhere else it is a cost: there the question is whether it does harm.
    """
    declared = outcomes(who, axes)
    lines = [_axis(who, axis, declared) for axis in axes]
    for line in who.controls:
        mine = {axis.title: declared[axis.score, line.label] for axis in axes if (axis.score, line.label) in declared}
        if mine:
            lines.append(f"- In sum, of {len(mine)} axes, {who.subject.label} against {line.label}: "
                         f"{_sum({title: outcome.verdict for title, outcome in mine.items()})}. Before the correction: "
                         f"{_sum({title: outcome.uncorrected for title, outcome in mine.items()}, False)}.")
    if declared:
        lines.append(f"- Corrected by Holm over these {len(declared)} comparisons (every axis, every control); p is the "
                     "value before it. No difference shown is no proof that there is none.")
    # who is a control is a flag's choice: a report must show what was left out by it
    lines.append(f"- Compared with {', '.join(line.label for line in who.controls)}. Not compared with, as base or experts: "
                 f"{', '.join(line.label for line in (who.base, *who.experts))}.")
    return lines


def _axis(who: Roles, axis: Axis, declared: Mapping[tuple[str, str], Outcome]) -> str:
    from evaluator.statistics.comparison import over_seeds

    gains = [(line, d) for line in who.experts if (d := over_seeds(line.found, who.base.found, axis))]
    better = [(line, d) for line, d in gains if d.verdict(axis.higher) == "better"]
    own = over_seeds(who.subject.found, who.base.found, axis)
    fused = own is not None and own.verdict(axis.higher) == "better"
    if better:
        role = f"gain, improved by {', '.join(f'{line.label} ({_signed(d.value)})' for line, d in better)}"
    elif fused:
        role = f"gain of the fusion, {who.subject.label} against {who.base.label} {_numbers(own)}; no expert improves on it"
    elif gains:
        role = f"cost, no expert improves on {who.base.label}"
    else:
        role = "cost, base and experts cannot be compared here"
    sentences = []
    for line in who.controls:
        outcome = declared.get((axis.score, line.label))
        if outcome is None:
            sentences.append(f"not comparable with {line.label}")
            continue
        p = f"p {_p(outcome.difference.p)}, Holm {_p(outcome.corrected)}"
        sentences.append(f"{_word(outcome, bool(better or fused))} {line.label} ({_numbers(outcome.difference)}, {p}"
                         f"{_open_harm(outcome, bool(better or fused))})")
    return f"- {axis.title} ({role}): {who.subject.label} {'; '.join(sentences)}."


def _word(outcome: Outcome, gain: bool) -> str:
    if gain:
        return {"better": "beats", "worse": "does not beat (is worse than)",
                "no difference": "does not beat (level with)"}[outcome.verdict]
    # a correction guards against claims; of harm it must not hide the first sign
    hidden = "is worse, before the correction only, than" if outcome.uncorrected == "worse" else "shows no harm against"
    return {"better": "is better than", "worse": "is worse than", "no difference": hidden}[outcome.verdict]


def _open_harm(outcome: Outcome, gain: bool) -> str:
    """For a cost without harm shown: how much harm the interval leaves possible."""
    d = outcome.difference
    worst = d.low if outcome.higher else d.high
    if gain or outcome.verdict != "no difference" or math.isnan(worst):
        return ""
    return f"; {_signed(worst)} is not ruled out" if (worst < 0) == outcome.higher and worst else ""


def _sum(verdicts: Mapping[str, str], every: bool = True) -> str:
    parts = []
    for verdict, said in (("better", "better"), ("no difference", "no difference shown"), ("worse", "worse")):
        titles = [title for title, outcome in verdicts.items() if outcome == verdict]
        if every or verdict != "no difference":
            parts.append(f"{said} on {len(titles)}" + (f" ({', '.join(titles)})" if titles else ""))
    return "; ".join(parts)


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _numbers(d: Difference) -> str:
    ends = "" if math.isnan(d.low) or math.isnan(d.high) else f" [{d.low:.3f}, {d.high:.3f}]"
    return _signed(d.value) + ends


def _p(value: float) -> str:
    return "unknown" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
