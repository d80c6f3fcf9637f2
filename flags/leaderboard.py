"""Flags of workflow/leaderboard.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import RunFlags, name_problems
from flags.card import CardFlags


@dataclass(frozen=True)
class LeaderboardArgs(CardFlags, RunFlags):
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
    dry_run: bool = flag(False, "print the plan: every command, hours, memory; run nothing")

    @property
    def only_arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word.strip() for word in self.only.split(",") if word.strip()))

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        seeds = tuple(int(word) for word in self.seeds.split(",") if word.strip())
        return seeds[:1] if self.quick else seeds

    def problems(self) -> list[str]:
        words = [word.strip() for word in self.seeds.split(",") if word.strip()]
        found = name_problems("--name", self.name)
        if not words or not all(word.isdigit() and int(word) < 1 << 32 for word in words):
            found.append(f"--seeds {self.seeds}: needs whole numbers from 0 to {(1 << 32) - 1}, commas, e.g. 42,43,44")
        elif len({int(word) for word in words}) < len(words):
            found.append(f"--seeds {self.seeds}: the same seed twice; give it once")
        return [*found, *super().problems()]
