"""Flags of evaluator/agreement.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import ResultsFlags, SeedFlags, name_problems
from flags.inference import answers_problems


@dataclass(frozen=True)
class AgreementArgs(SeedFlags, ResultsFlags):
    """How far the offline judges agree (Cohen's kappa) on the answers of finished runs, and where they do not.

    python evaluator/agreement.py --runs "base,safety,mix"
    """

    heading, general = "Agreement", False
    runs: str = flag("", "runs whose answers are judged, separated by commas; base: the raw base model")
    tasks: str = flag("safety,overrefusal", "whose answers: TASK or TASK+ATTACK of inference.py, separated by commas")
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    examples: int = flag(3, "rows shown for each pair of judges that disagree; 0: counts only", low=0)
    labels: str = flag("", "answers that people labelled (as of evaluate_safety.py --labels; own: those of the embedded "
                           "models): the judges' errors on them, agreement of both passes, in NAME_labels.md; empty: none")
    name: str = flag("agreement", "results/report/NAME.md and NAME.json")

    @property
    def run_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.runs.split(",") if name.strip())

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = name_problems("--name", self.name)
        if not self.run_names and not self.labels:
            found.append("--runs: name the runs whose answers are judged, e.g. --runs \"base,safety,mix\"; or give --labels")
        if not self.task_names:
            found.append("--tasks: name at least one, e.g. --tasks safety,overrefusal")
        return found + [problem for task in self.task_names for problem in answers_problems("--tasks", task)]
