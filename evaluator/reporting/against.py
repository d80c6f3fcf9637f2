"""Every row of a report against one reference row on every axis, corrected by Holm: for any models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data import escaped
from errors import UserError
from evaluator.reporting.findings import Outcome
from evaluator.reporting.formats import interval, p_text

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis

_WORDS = {"better": "is better", "worse": "is worse", "no difference": "shows no difference"}


def reference(lines: Sequence[Line], named: str) -> Line:
    """The row that --against names, by its label or its run.

    Raises:
        UserError: no row has this name.
    """
    for line in lines:
        if named in (line.label, line.run):
            return line
    raise UserError(f"--against {named}: no row is called so; allowed: {', '.join(line.label for line in lines)}")


def outcomes(lines: Sequence[Line], ground: Line, axes: Sequence[Axis]) -> dict[tuple[str, str], Outcome]:
    """(axis title, row's label) -> outcome of row minus ``ground``; all of them are one family for Holm."""
    from evaluator.statistics.comparison import over_seeds
    from evaluator.statistics.metrics import holm

    found = {(axis.title, line.label): (d, axis.higher) for line in lines if line is not ground for axis in axes
             if (d := over_seeds(line.found, ground.found, axis))}
    corrected = holm([d.p for d, _ in found.values()])
    return {key: Outcome(d, p, higher) for (key, (d, higher)), p in zip(found.items(), corrected, strict=True)}


def findings(lines: Sequence[Line], ground: Line, axes: Sequence[Axis],
             declared: Mapping[tuple[str, str], Outcome]) -> list[str]:
    """A line for each axis with every row against the reference, then how many axes each is better and worse on."""
    others, said = [line for line in lines if line is not ground], []
    name = escaped.markdown(ground.label)
    for axis in axes:
        parts = [_sentence(line.label, declared.get((axis.title, line.label))) for line in others]
        said.append(f"- {axis.title} against {name}: {'; '.join(parts)}.")
    for line in others:
        verdicts = [outcome.verdict for (_, label), outcome in declared.items() if label == line.label]
        open_harm = sum(outcome.hidden_harm for (_, label), outcome in declared.items() if label == line.label)
        if verdicts:
            hidden = f" ({open_harm} more worse before the correction only)" if open_harm else ""
            said.append(f"- In sum, of {len(verdicts)} axes, {escaped.markdown(line.label)} is better than {name} on "
                        f"{verdicts.count('better')}, worse on {verdicts.count('worse')}{hidden}, shows no difference on "
                        f"{verdicts.count('no difference')}.")
    if declared:
        said.append(f"- Corrected by Holm over these {len(declared)} comparisons (every axis, every row against {name}); p "
                    "is the value before it. No difference shown is no proof that there is none.")
    return said


def _sentence(label: str, outcome: Outcome | None) -> str:
    label = escaped.markdown(label)
    if outcome is None:
        return f"{label} cannot be compared"
    word = "is worse, before the correction only" if outcome.hidden_harm else _WORDS[outcome.verdict]
    return f"{label} {word} ({numbers(outcome)})"


def numbers(outcome: Outcome) -> str:
    """A comparison's difference, its interval, and p before and after the correction."""
    d = outcome.difference
    return f"{d.value:+.3f}{interval(d.low, d.high)}, p {p_text(d.p)}, Holm {p_text(outcome.corrected)}"
