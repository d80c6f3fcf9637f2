"""Flags of evaluator/equal_utility.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import SKILLS, ResultsFlags, SeedFlags


@dataclass(frozen=True)
class EqualUtilityArgs(SeedFlags, ResultsFlags):
    """Is a model safer than a line of models at the same utility? Compare a mask with WiSE-FT, or with random masks.

    python evaluator/equal_utility.py --subject m1+m2+m3 --line aligned,wise_25,wise_50,wise_75,english --skill english
    """

    heading, general = "Comparison", False
    subject: str = flag("", "the run that is asked about; A+B+C: several seeds of it")
    line: str = flag("", "runs along a line, commas: their safety is interpolated at the subject's utility; one: as is, and "
                         "the answer says that utilities differ; A+B+C: several seeds of a point")
    skill: str = flag("english", "task whose held-out likelihood is the utility", choices=SKILLS)
    safety: str = flag("balance", "balance: refusal of harmful prompts minus refusal of harmless ones; refusal alone; or "
                                  "discrimination: refusal_auc of evaluate_refusal.py",
                       choices=("balance", "refusal", "discrimination"))
    draws: int = flag(2000, "bootstrap draws over test rows", low=100)
    name: str = flag("equal_utility", "results/report/NAME.json")

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.subject.split("+") if name.strip())

    @property
    def points(self) -> tuple[tuple[str, ...], ...]:
        """Runs of each point of the line; several where a point is A+B+C."""
        return tuple(tuple(run.strip() for run in point.split("+") if run.strip()) for point in self.line.split(",")
                     if point.strip(" +"))

    def problems(self) -> list[str]:
        found = [] if self.subjects else ["--subject: name the run that is asked about"]
        rows = (("--subject", self.subjects), *(("--line", point) for point in self.points))
        found += [f"{name} {'+'.join(runs)}: the same run twice in one row; give it once" for name, runs in rows
                  if len(set(runs)) < len(runs)]
        return found + ([] if self.points else ["--line: name the runs to compare with, separated by commas"])
