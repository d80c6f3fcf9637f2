"""Flags of evaluator/attack_table.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import ATTACKS, ResultsFlags, name_problems
from flags.evaluate import FORMATS, format_names, format_problems
from flags.inference import answers_problems


@dataclass(frozen=True)
class AttackTableArgs(ResultsFlags):
    """Refusal of harmful prompts under attack wrappers, beside that of the same prompts as they are.

    python evaluator/attack_table.py --runs "aligned,SOMF=somf_1+somf_2+somf_3" --attacks cot,suffix
    """

    heading, general = "Table", False
    runs: str = flag("", "rows of the table, LABEL=RUN or RUN, separated by commas; A+B+C: one row over several seeds")
    attacks: str = flag("cot,suffix", f"columns, commas: {', '.join(ATTACKS[1:])}")
    task_name: str = flag("safety", "whose harmful prompts were put in the wrappers, e.g. catqa")
    name: str = flag("attacks", "results/report/NAME.md and NAME.json")
    format: str = flag("md,json", f"what is written, commas: {', '.join(FORMATS)}")

    @property
    def named_attacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.attacks.split(",") if name.strip()))

    @property
    def formats(self) -> tuple[str, ...]:
        return format_names(self.format)

    @property
    def rows(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(label, runs) of every row."""
        pairs = (item.rpartition("=") for item in self.runs.split(",") if item.strip())
        return tuple(((label or runs).strip(), tuple(run.strip() for run in runs.split("+") if run.strip()))
                     for label, _, runs in pairs)

    def problems(self) -> list[str]:
        found = [*name_problems("--name", self.name), *format_problems(self.format)]
        if not self.rows or any(not runs for _, runs in self.rows):
            found.append('--runs: name the rows, e.g. --runs "aligned,SOMF=somf_1+somf_2"')
        if unknown := [name for name in self.named_attacks if name not in ATTACKS[1:]]:
            found.append(f"--attacks {','.join(unknown)}: not known; allowed: {', '.join(ATTACKS[1:])}")
        if not self.named_attacks:
            found.append(f"--attacks: name one or more of {', '.join(ATTACKS[1:])}")
        return found + ([] if "+" not in self.task_name else [f"--task_name {self.task_name}: name the task alone"]) + (
            answers_problems("--task_name", self.task_name))
