"""Group of flags: what every command that runs a graph of steps reads."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import RunFlags
from flags.card import CardFlags


@dataclass(frozen=True)
class GraphFlags(CardFlags, RunFlags):
    """Which arms, over which seeds, and whether the plan is only told."""

    heading, general = "Graph", False
    only: str = flag("", "these arms alone, with what they need, commas; empty: all")
    seeds: str = flag("42", "seeds, commas: every arm is made and scored with each")
    dry_run: bool = flag(False, "print the plan: every command, hours, memory; run nothing")

    @property
    def only_arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word.strip() for word in self.only.split(",") if word.strip()))

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        return tuple(int(word) for word in self.seeds.split(",") if word.strip())

    def problems(self) -> list[str]:
        words, found = [word.strip() for word in self.seeds.split(",") if word.strip()], super().problems()
        if not words or not all(word.isdigit() and int(word) < 1 << 32 for word in words):
            found.append(f"--seeds {self.seeds}: needs whole numbers from 0 to {(1 << 32) - 1}, commas, e.g. 42,43,44")
        elif len({int(word) for word in words}) < len(words):
            found.append(f"--seeds {self.seeds}: the same seed twice; give it once")
        return found
