"""The target --durability: rows made one standard checkpoint each, attacked by a published command line, scored on the way.

An arm whose ``durability`` in the table names a layout is exported in it (models/fuse.py export); ``whole`` is one
already. One harmful fine-tuning keeps the checkpoints that are scored, and one on harmless rows for each share of
harmful ones has as many steps. Every step is recorded as all others are, so what the leaderboard has made is not made again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError
from workflow import plan

#: The endpoint that gives the score before the attack of rows that are not exported.
_BEFORE = "refusal"
_KEYS = {"steps", "shares", "samples", "export", "harmful", "mixed", "score"}
Made = tuple[tuple[str, ...], dict[str, Any]]


def chosen(table: plan.Table, only: Sequence[str], quick: bool) -> list[str]:
    """The arms that are attacked.

    Raises:
        UserError: ``only`` names arms that are not there or not marked, or the table has no section for it.
    """
    wrong = [f"--durability: {key}: unknown in the section durability of the table; allowed: {', '.join(sorted(_KEYS))}"
             for key in table.durability.keys() - _KEYS]
    wrong += [f"--durability: the section durability of the table needs {key}" for key in _KEYS - table.durability.keys()]
    if _BEFORE not in table.endpoints:
        wrong.append(f"--durability: the table needs the endpoint {_BEFORE}, which scores a row before the attack")
    if not wrong:
        wrong = _steps_problems("durability", table.durability["steps"]) + _steps_problems(
            "quick, durability", table.quick.get("durability", table.durability["steps"]))
    if wrong:
        raise UserError(*sorted(wrong))
    marked = [name for name, arm in table.arms.items() if arm.durability]
    plan.chosen(table, only, quick, more=True)
    if other := [name for name in only if name not in marked]:
        raise UserError(*(f"--only {name}: not marked durability in the table; marked: {', '.join(marked)}"
                          for name in other))
    return [name for name in marked if (name in only if only else table.arms[name].quick or not quick)]


def _steps_problems(where: str, steps: Any) -> list[str]:
    numbers = isinstance(steps, list) and steps and all(isinstance(n, int) and n > 0 for n in steps)
    return [] if numbers and steps == sorted(set(steps)) else [
        f"--durability: {where}: steps {steps}: needs whole numbers of 1 or more, rising, e.g. [5, 20, 80]"]


def steps(table: plan.Table, names: Sequence[str], seeds: Sequence[int], results: Path, *, preset: str, asked: bool,
          quick: bool = False) -> list[plan.Step]:
    """Every step of these arms: what they are made of, exported, attacked, scored.

    Args:
        preset: the one in force. An attack's base is no name that would choose one, so its lines name it.
        asked: whether ``--preset`` named it; only then the other lines do.

    Raises:
        UserError: a command line that its own flags refuse; all of them at once.
    """
    given = {"preset": preset if asked else "", "quick": quick}
    made = plan.steps(replace(table, endpoints={}), names, seeds, results, **given)
    whole = [name for name in names if not _exported(table.arms[name])]
    before = plan.steps(replace(table, endpoints={_BEFORE: table.endpoints[_BEFORE]}), whole, seeds, results, **given)
    made += [step for step in before if "__" in step.name]
    lines = [(name, *line) for seed in seeds for name in names
             for line in _Attack.of(table, name, seed, results / f"seed_{seed}", preset, quick).lines()]
    return made + plan.parsed(lines)


def _exported(arm: plan.Arm) -> bool:
    return arm.durability != "whole"


@dataclass(frozen=True)
class _Attack:
    """One arm, one seed.

    Args:
        fill: of the table's lines, with --preset.
        name: of the run that is attacked; "" for the base.
        model: as --model_name_or_path takes it.
        needs: the manifest of that run, or of what it is made of before its export.
    """

    table: plan.Table
    fill: plan.Words
    arm: plan.Arm
    seed: int
    root: Path
    quick: bool
    name: str
    model: str
    needs: tuple[Path, ...]

    @classmethod
    def of(cls, table: plan.Table, name: str, seed: int, root: Path, preset: str, quick: bool) -> _Attack:
        arm, fill = table.arms[name], plan.Words.of(table, seed, root, preset, quick)
        run = f"whole_{name}" if _exported(arm) else arm.run if arm.make else ""
        model = str(root / "outputs" / run) if run else fill.base
        parts = [arm] if arm.make else [table.arms[other] for other in arm.needs]
        needs = tuple(path for part in parts if (path := plan.manifest_of(part, root)))
        return cls(table, fill, arm, seed, root, quick, run, model, needs)

    @property
    def steps(self) -> list[int]:
        own = self.table.durability["steps"]
        return self.table.quick.get("durability", own) if self.quick else own

    def lines(self) -> Iterator[Made]:
        """Words and the rest of every step, what is needed first."""
        section, needs = self.table.durability, self.needs
        if _exported(self.arm):
            words = self._filled(section["export"], run=self.arm.run, layout=self.arm.durability, name=self.name)
            yield self._made("whole", words, self._manifest(self.name), needs, "export", seeded=False)
            needs = (self._manifest(self.name),)
            yield self._scored(self.name, needs, "refusal")
        yield from self._harmful(needs)
        for share, run in mixed_runs(self.table, self.arm.name).items():
            words = self._filled(section["mixed"], most=self.steps[-1], name=run)
            words += ["--extra_data", "reattack", "--extra_share", f"{share:g}"] if share else []
            yield self._made(run.removesuffix(f"_{self.arm.name}"), [*words, *self._few(words), *self._base()],
                             self._manifest(run), needs, "attack")
            yield self._scored(run, (self._manifest(run),), "refusal_few")

    def _harmful(self, needs: tuple[Path, ...]) -> Iterator[Made]:
        run, every = f"harmful_{self.arm.name}", math.gcd(*self.steps)
        words = self._filled(self.table.durability["harmful"], most=self.steps[-1], every=every,
                             kept=self.steps[-1] // every, name=run)
        yield self._made("harmful", [*words, *self._few(words), *self._base()], self._manifest(run), needs, "attack")
        for step in self.steps:
            yield self._scored(run, (self._manifest(run),), "refusal_few", step if step != self.steps[-1] else None)

    def _scored(self, run: str, needs: tuple[Path, ...], cost: str, step: int | None = None) -> Made:
        folder, attacked = f"cross_{run}", run != self.name
        words = self._filled(self.table.durability["score"], folder=folder)
        words += [] if step is None else ["--checkpoint_number", str(step)]
        samples = self.table.quick.get("samples") if self.quick else self.table.durability["samples"] if attacked else None
        words += ["--num_samples", str(samples)] if samples else []
        # before the attack it is a run like any other
        words += self._base() if attacked else []
        scores = self.root / "scores" / (folder if step is None else f"{folder}_{step}") / "evaluate_refusal.json"
        named = run.removesuffix(f"_{self.arm.name}") + ("" if step is None else f"_{step}")
        return self._made(f"{named}_scored", words, scores, needs, cost)

    def _made(self, kind: str, words: Sequence[str], makes: Path, needs: tuple[Path, ...], cost: str, *, seeded: bool = True
              ) -> Made:
        # an export draws nothing
        common = self.fill.common if seeded else self.fill.common[2:]
        moe = f"{cost}_moe" if self.arm.durability not in ("whole", "dense") else cost
        return (*words, *common), {
            "name": f"s{self.seed}_{self.arm.name}__{kind}", "arm": self.arm.name, "seed": self.seed, "needs": needs,
            "makes": makes, **self.fill.cost(moe if moe in self.table.costs else cost)}

    def _filled(self, line: str, **more: Any) -> list[str]:
        return shlex.split(self.fill.filled(line, **more))

    def _few(self, words: Sequence[str]) -> list[str]:
        return ["--max_train_samples", str(2 * self.table.quick.get("samples", 8))] if self.quick else []

    def _base(self) -> list[str]:
        return ["--model_name_or_path", self.model]

    def _manifest(self, run: str) -> Path:
        return self.root / "outputs" / run / "manifest.json"


def mixed_runs(table: plan.Table, name: str) -> dict[float, str]:
    """Share of harmful rows -> the run that was fine-tuned on such a mixture."""
    return {share: f"mixed_{round(100 * share):02d}_{name}" for share in table.durability["shares"]}


def report_words(table: plan.Table, names: Sequence[str], roots: Sequence[Path], results: Path, quick: bool
                 ) -> list[tuple[str, ...]]:
    """The command lines of the table, and of the page that draws its curves."""
    arms = [table.arms[name] for name in names]
    start = {arm.name: f"whole_{arm.name}" if _exported(arm) else arm.run for arm in arms}
    section = table.durability
    taken = table.quick.get("durability", section["steps"]) if quick else section["steps"]
    rows = [f"{arm.label}={start[arm.name]}/" + "/".join((f"harmful_{arm.name}", *mixed_runs(table, arm.name).values()))
            for arm in arms]
    places = ("--roots", ",".join(map(str, roots)), "--output_dir", str(results))
    joint = next((arm.label for arm in arms if arm.name == "mix"), "")
    against = ("--against", joint) if joint else ()
    kinds = ("refused", "auc", "mixed") if section["shares"] else ("refused", "auc")
    curves = ",".join(str(results / "report" / f"durability_{kind}.json") for kind in kinds)
    experts = ",".join(start[arm.name] for arm in arms if arm.kind == "expert") or "none"
    shown = "refusal_auc,refusal_at_10"
    return [("evaluator/durability.py", "--runs", ",".join(rows), *places, "--steps", ",".join(map(str, taken)), "--shares",
             ",".join(f"{share:g}" for share in section["shares"]), *against, "--format", "md,csv,latex,json"),
            ("evaluator/report.py", "--runs", ",".join(f"{arm.label}={start[arm.name]}" for arm in arms), *places, "--name",
             "durability_page", "--title", "Durability under harmful fine-tuning", "--experts", experts, "--columns",
             shown, "--scores", shown, *against, "--curves", curves, "--format", "html,json", "--answers", "0")]
