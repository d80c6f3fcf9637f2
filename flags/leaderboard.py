"""Flags of workflow/leaderboard.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import name_problems
from flags.graph import GraphFlags


@dataclass(frozen=True)
class LeaderboardArgs(GraphFlags):
    """Every arm of a table made, scored and compared, each step a command line of its own, run by snakemake.

    bash scripts/leaderboard.sh --seeds 42,43,44 -- --cores 2
    """

    heading, general = "Leaderboard", False
    arms: str = flag("workflow/arms.yaml", "table of the arms and of what scores them")
    only: str = flag("", "these arms alone, with what they need, commas; empty: all that are not marked more")
    more: bool = flag(False, "the arms marked more too")
    seeds: str = flag("42,43,44", "seeds, commas: every arm is made and scored with each")
    quick: bool = flag(False, "the arms marked quick, one seed, a few steps and prompts: whether everything runs, nothing "
                              "about methods")
    durability: bool = flag(False, "instead of the table: the arms marked durability, fine-tuned on harmful rows; how long "
                                   "their refusals last")
    name: str = flag("leaderboard", "everything goes to NAME below --output_dir, the table to NAME/report")
    overwrite: bool = flag(False, "make and score anew the arms that are asked for, and what is made of them: after a "
                                  "change of code or data, which nothing else sees")

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        return super().seed_numbers[:1] if self.quick else super().seed_numbers

    def problems(self) -> list[str]:
        return [*name_problems("--name", self.name), *super().problems()]
