"""Flags of python -m evaluator.registry."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import ResultsFlags, name_problems
from flags.evaluate import FORMATS, format_names, format_problems

#: What --filter can ask for.
KEYS = ("run", "kind", "method", "base", "seed", "date")


@dataclass(frozen=True)
class FilterFlags(ResultsFlags):
    """Which runs."""

    heading, general = "What is shown", False
    filter: str = flag("", f"only these, KEY=TEXT with commas, * for anything: {', '.join(KEYS)}")

    @property
    def filters(self) -> tuple[tuple[str, str], ...]:
        """(key, pattern) of every part of --filter."""
        parts = [part.partition("=") for part in self.filter.split(",") if part.strip()]
        return tuple((key.strip(), pattern.strip()) for key, _, pattern in parts)

    def problems(self) -> list[str]:
        return [*(f"--filter {key}: needs KEY=TEXT, KEY one of {', '.join(KEYS)}" for key, pattern in self.filters
                  if key not in KEYS or not pattern), *super().problems()]


@dataclass(frozen=True)
class ListArgs(FilterFlags):
    """The runs of a results folder: kind, method, base, date, seed, main scores.

    python -m evaluator.registry list --filter "kind=adapter,method=dpo"
    """

    heading, general = "What is shown", False
    format: str = flag("md", "how", choices=("md", "json"))


@dataclass(frozen=True)
class ShowArgs(ResultsFlags):
    """One run: settings, what it was made from, answers, scores, and whether the files on disk are still those.

    python -m evaluator.registry show RUN
    """

    heading, general = "What is shown", False
    format: str = flag("md", "how", choices=("md", "json"))


@dataclass(frozen=True)
class CompareArgs(ResultsFlags):
    """Two runs: settings that differ, and differences of scores on the same prompts (the second minus the first).

    python -m evaluator.registry compare RUN RUN
    """

    heading, general = "What is shown", False
    format: str = flag("md", "how", choices=("md", "json"))


@dataclass(frozen=True)
class ExportScoresArgs(FilterFlags):
    """All scores of all runs.

    python -m evaluator.registry export --format csv,json
    """

    heading, general = "What is shown", False
    format: str = flag("csv", f"what is written, commas: {', '.join(FORMATS)}")
    name: str = flag("scores", "results/report/NAME.csv and the like")

    @property
    def formats(self) -> tuple[str, ...]:
        return format_names(self.format)

    def problems(self) -> list[str]:
        return [*name_problems("--name", self.name), *format_problems(self.format), *super().problems()]
