"""Flags of evaluator/durability.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import ResultsFlags, SeedFlags, name_problems
from flags.evaluate import FORMATS, format_names, format_problems


@dataclass(frozen=True)
class DurabilityArgs(SeedFlags, ResultsFlags):
    """How long refusals last under harmful fine-tuning, from the scores of evaluate_refusal.py before and during it.

    python evaluator/durability.py --runs "naive mix=mix/harmful_mix,tuned MoE=whole_moe/harmful_moe" --steps 5,20,80
    """

    heading, general = "Table", False
    runs: str = flag("", "rows, commas: LABEL=START/ATTACKED, the run before the attack and the run of the attack; with "
                         "--shares also /MIXED for each share, a run on harmless rows with that share of harmful ones")
    roots: str = flag("", "results folders, one per seed, commas; empty: --output_dir")
    steps: str = flag("5,20,80", "steps of ATTACKED that were scored, rising, commas: its checkpoints of these numbers, "
                                 "and for the last step its end")
    shares: str = flag("", "shares of harmful rows, commas, one for each MIXED, e.g. 0,0.05,0.3; empty: none")
    against: str = flag("", "row that every other one is compared with; empty: none")
    title: str = flag("Durability under harmful fine-tuning", "headline")
    name: str = flag("durability", "results/report/NAME.md and the like; its curves: NAME_refused.json, NAME_auc.json, "
                                   "NAME_mixed.json")
    format: str = flag("md,json", f"what is written, commas: {', '.join(FORMATS)}")

    @property
    def rows(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(label, (start, attacked, mixed ..)) of every row."""
        # from the right: a label may hold "=", a run may not
        pairs = (item.rpartition("=") for item in self.runs.split(",") if item.strip())
        return tuple((label.strip() or runs.partition("/")[0].strip(), tuple(run.strip() for run in runs.split("/")))
                     for label, _, runs in pairs)

    @property
    def step_numbers(self) -> tuple[int, ...]:
        return tuple(int(word) for word in self.steps.split(",") if word.strip())

    @property
    def share_numbers(self) -> tuple[float, ...]:
        return tuple(float(word) for word in self.shares.split(",") if word.strip())

    @property
    def formats(self) -> tuple[str, ...]:
        return format_names(self.format)

    def problems(self) -> list[str]:
        found = [*name_problems("--name", self.name), *format_problems(self.format), *self._numbers()]
        if found and any(text.startswith(("--steps", "--shares")) for text in found):
            return [*found, *super().problems()]
        wanted = 2 + len(self.share_numbers)
        if not self.rows:
            found.append('--runs: name the rows, e.g. --runs "naive mix=mix/harmful_mix"')
        for label, runs in self.rows:
            if len(runs) != wanted or not all(runs):
                mixed = f" and {wanted - 2} runs of --shares" if wanted > 2 else ""
                found.append(f"--runs {label}={'/'.join(runs)}: needs LABEL=START/ATTACKED{mixed}, with / between them")
        if self.against and self.against not in (labels := [label for label, _ in self.rows]):
            found.append(f"--against {self.against}: no row is called so; allowed: {', '.join(labels)}")
        return [*found, *super().problems()]

    def _numbers(self) -> list[str]:
        words = [word.strip() for word in self.steps.split(",") if word.strip()]
        steps = [int(word) for word in words if word.isdigit()]
        found = []
        if not words or len(steps) < len(words) or steps != sorted(set(steps)) or steps[0] < 1:
            found.append(f"--steps {self.steps}: needs whole numbers of 1 or more, rising, commas, e.g. 5,20,80")
        try:
            shares = self.share_numbers
        except ValueError:
            shares = (-1.0,)
        if not all(0 <= share < 1 for share in shares) or list(shares) != sorted(set(shares)):
            found.append(f"--shares {self.shares}: needs numbers from 0 to below 1, rising, commas, e.g. 0,0.05,0.3")
        return found
