"""From the table of arms to steps: command lines, what each needs and makes, what it costs. Loads no torch, runs nothing."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config import ROOT
from errors import UserError
from workflow import commands, comparisons

_ARM_KEYS = {"label", "kind", "make", "run", "needs", "cost", "key", "quick", "more", "shown", "makes", "scored",
             "durability"}
_ENDPOINT_KEYS = {"rows", "cost", "samples", "after", "makes", "run"}
KINDS = ("control", "expert", "merge", "h3fusion", "somf", "lora_fusion", "ensemble")
_TOP_KEYS = {"experts", "arms", "words", "endpoints", "quick", "costs", "durability", "comparisons"}
#: How an arm becomes the checkpoint that --durability attacks: it is one, or a layout of models/fuse.py export.
DURABLE = ("whole", "dense", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class Arm:
    """A row of the table, or what others are made of (``shown`` is off).

    Args:
        run: what it is called under outputs; "base" for the base, a weighted sum's name for a sum, which has no folder.
        make: the command that makes its folder; empty: there is none to make.
        needs: arms that it is made of.
        key: whether it also answers prompts.
        more: whether it is left out unless asked for: what would make the table take too long.
        makes: what its command leaves behind, below the seed's results; empty: the manifest of its run.
        scored: words that go to every command that scores it, e.g. the base below its adapter.
        durability: one of ``DURABLE``; empty: --durability leaves it alone.
    """

    name: str
    label: str
    kind: str
    run: str
    make: str = ""
    needs: tuple[str, ...] = ()
    cost: str = ""
    key: bool = False
    quick: bool = False
    more: bool = False
    shown: bool = True
    makes: str = ""
    scored: str = ""
    durability: str = ""

    @property
    def folder(self) -> str:
        """Its folder of answers and scores."""
        return "raw" if self.run == "base" else f"cross_{self.run}"


@dataclass(frozen=True)
class Endpoint:
    """What is measured of a row: a command, and the endpoints whose results it reads (``after``; base.NAME: the base's)."""

    name: str
    run: str
    makes: str
    rows: str
    cost: str
    samples: int | None = None
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A file of arms, checked."""

    experts: tuple[str, ...]
    arms: Mapping[str, Arm]
    endpoints: Mapping[str, Endpoint]
    words: Mapping[str, str]
    quick: Mapping[str, Any]
    costs: Mapping[str, Mapping[str, float]]
    durability: Mapping[str, Any] = field(default_factory=dict)
    comparisons: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Step:
    """One command line.

    Args:
        name: unique, a word that snakemake takes for a rule.
        words: file of the command, relative to the repository, and its flags.
        makes: the manifest, or file of scores, that is there when it is finished.
        needs: what must be there before.
        gpu_gb: memory that it takes of a card, where that was reckoned (``estimate``).
        settings: what ``words`` resolve to (``commands.settings``).
    """

    name: str
    arm: str
    seed: int
    words: tuple[str, ...]
    makes: Path
    needs: tuple[Path, ...]
    seconds: float = 0.0
    memory_mb: int = 1000
    disk_mb: int = 1
    gpu_gb: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Table:
    """The table of a file.

    Raises:
        UserError: no such file, no YAML, unknown keys, arms that need unknown ones or each other; all at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--arms {path}: not readable as YAML ({type(error).__name__}); give a table like workflow/arms.yaml"
                        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise UserError(f"--arms {path}: needs a mapping with arms and endpoints; see workflow/arms.yaml")
    return checked(content, path.name)


def checked(content: Mapping[str, Any], file: str) -> Table:
    """The table of a file's content; ``file`` is what its errors name.

    Raises:
        UserError: as ``read``.
    """
    problems = [f"{file}: {key}: unknown; allowed: {', '.join(sorted(_TOP_KEYS))}" for key in content.keys() - _TOP_KEYS]
    experts = tuple(content.get("experts") or ())
    arms = {name: _arm(name, body, experts, file, problems) for name, body in content["arms"].items()}
    endpoints = {name: _endpoint(name, body, file, problems) for name, body in (content.get("endpoints") or {}).items()}
    costs = content.get("costs") or {}
    for arm in arms.values():
        problems += [f"{file}: {arm.name} needs {name}, which is no arm{_near(name, arms)}" for name in arm.needs
                     if name not in arms]
    for item in (*arms.values(), *endpoints.values()):
        if item.cost and item.cost not in costs:
            problems.append(f"{file}: {item.name}: cost {item.cost}: has no line in costs{_near(item.cost, costs)}")
    problems += comparisons.problems(content.get("comparisons") or [], arms, KINDS, file)
    if problems:
        raise UserError(*problems)
    table = Table(experts, arms, endpoints, content.get("words") or {}, content.get("quick") or {}, costs,
                  content.get("durability") or {}, content.get("comparisons") or ())
    in_order(table, arms)
    return table


def _arm(name: str, body: Any, experts: tuple[str, ...], file: str, problems: list[str]) -> Arm:
    body = body if isinstance(body, dict) else {}
    problems += [f"{file}: {name}: {key}: unknown; allowed: {', '.join(sorted(_ARM_KEYS))}"
                 for key in body.keys() - _ARM_KEYS]
    if body.get("kind") not in KINDS:
        problems.append(f"{file}: {name}: kind {body.get('kind')}: allowed: {', '.join(KINDS)}")
    if not str(name).isidentifier():
        problems.append(f"{file}: {name}: letters, digits and '_' only, no digit first")
    if body.get("durability", "whole") not in DURABLE:
        problems.append(f"{file}: {name}: durability {body['durability']}: allowed: {', '.join(DURABLE)}")
    needs = experts if body.get("needs") == "experts" else tuple(body.get("needs") or ())
    label = str(body.get("label", name))
    if "," in label:
        problems.append(f"{file}: {name}: label {label}: a comma ends a row of report.py --runs; write it without")
    return Arm(name, label, body.get("kind", ""), str(body.get("run", name)), body.get("make", ""), needs,
               body.get("cost", ""), bool(body.get("key")), bool(body.get("quick")), bool(body.get("more")),
               bool(body.get("shown", True)), str(body.get("makes", "")), str(body.get("scored", "")),
               str(body.get("durability", "")))


def _endpoint(name: str, body: Any, file: str, problems: list[str]) -> Endpoint:
    body = body if isinstance(body, dict) else {}
    problems += [f"{file}: {name}: {key}: unknown; allowed: {', '.join(sorted(_ENDPOINT_KEYS))}"
                 for key in body.keys() - _ENDPOINT_KEYS]
    problems += [f"{file}: {name}: needs {key}" for key in ("run", "makes") if not body.get(key)]
    if body.get("rows") not in ("all", "key"):
        problems.append(f"{file}: {name}: rows {body.get('rows')}: allowed: all, key")
    return Endpoint(name, body.get("run", ""), body.get("makes", ""), body.get("rows", ""), body.get("cost", ""),
                    body.get("samples"), tuple(body.get("after") or ()))


def _near(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def in_order(table: Table, names: Iterable[str]) -> list[str]:
    """These arms and all that they are made of, what is needed first.

    Raises:
        UserError: an arm needs itself.
    """
    done: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            raise UserError(f"arms: {' -> '.join((*way, name))}: an arm cannot be made of itself")
        if name not in done:
            for other in table.arms[name].needs:
                visit(other, (*way, name))
            done.append(name)

    for name in names:
        visit(name, ())
    return done


def chosen(table: Table, only: Sequence[str], quick: bool, more: bool) -> list[str]:
    """The arms that are asked for, without what they are made of.

    Raises:
        UserError: ``only`` names arms that are not there.
    """
    if unknown := [name for name in only if name not in table.arms]:
        raise UserError(*(f"--only {name}: no such arm{_near(name, table.arms)}; there: {', '.join(table.arms)}"
                          for name in unknown))
    return [name for name, arm in table.arms.items()
            if (name in only if only else arm.quick if quick else more or not arm.more)]


def missing_commands(table: Table) -> dict[str, str]:
    """Endpoint -> its command, where the repository has no such file."""
    return {name: endpoint.run.split()[0] for name, endpoint in table.endpoints.items()
            if not (ROOT / endpoint.run.split()[0]).is_file()}


def steps(table: Table, names: Sequence[str], seeds: Sequence[int], results: Path, *, preset: str = "", quick: bool = False,
          scored: Mapping[str, Collection[str]] | None = None) -> list[Step]:
    """Every step of these arms, in an order in which what is needed comes first.

    Args:
        names: arms that are scored; what they are made of is made, not scored.
        results: each seed has its own folder ``seed_N`` in it, laid out as every results folder.
        preset: as ``--preset`` takes it; empty: the commands' own.
        scored: arm -> the endpoints that it is put to; None: as the endpoints' ``rows`` say.

    Raises:
        UserError: a command line that its own flags refuse; all of them at once.
    """
    absent = missing_commands(table)
    lines: list[tuple[str, tuple[str, ...], dict[str, Any]]] = []
    for seed in seeds:
        root = results / f"seed_{seed}"
        fill = Words.of(table, seed, root, preset, quick)
        for name in in_order(table, names):
            arm = table.arms[name]
            parts = {other: makes for other in arm.needs if (makes := manifest_of(table.arms[other], root))}
            here = [fill.of_arm(arm, root, tuple(parts.values()), seed)] if arm.make else []
            if name in names and arm.shown:
                here += [fill.of_endpoint(endpoint, arm, root, seed, table) for endpoint in table.endpoints.values()
                         if endpoint.name not in absent and (endpoint.rows == "all" or arm.key if scored is None else
                                                             endpoint.name in scored.get(name, ()))]
            lines += [(name, *line) for line in here]
    return parsed(lines)


def parsed(lines: Iterable[tuple[str, tuple[str, ...], dict[str, Any]]]) -> list[Step]:
    """Steps of (arm, words, the rest of a step).

    Raises:
        UserError: a command line that its own flags refuse; all of them at once.
    """
    made: list[Step] = []
    problems: dict[str, None] = {}
    for name, words, rest in lines:
        try:
            made.append(Step(words=words, settings=commands.settings(words), **rest))
        except UserError as error:
            said = f"arm {name}: {shlex.join(words[:3])} .."
            problems.update(dict.fromkeys(f"{said}: {one}" for one in error.problems))
    if problems:
        raise UserError(*problems)
    return made


def base_of(preset: str) -> str:
    """The base model of the steps: the preset's, or the default one."""
    return commands.parse(("models/llama_moe.py", *(("--preset", preset) if preset else ()))).args.model_name_or_path


def whose_endpoint(after: str, arm: str) -> tuple[str, str]:
    """(arm, endpoint) of an entry of ``Endpoint.after``: of the row's own, or, called base.ENDPOINT, of the base's."""
    whose, _, endpoint = after.rpartition(".")
    return whose or arm, endpoint


def manifest_of(arm: Arm, root: Path) -> Path | None:
    """The manifest of an arm's folder; None for the base and for a weighted sum, which have no folder of their own."""
    return root / (arm.makes or f"outputs/{arm.run}/manifest.json") if arm.make else None


@dataclass(frozen=True)
class Words:
    """Fills the lines of a table in; ``base`` is the base model of the steps, the preset's or the default."""

    table: Table
    common: tuple[str, ...]
    quick: bool
    base: str

    @classmethod
    def of(cls, table: Table, seed: int, root: Path, preset: str, quick: bool) -> Words:
        """Those of a seed, whose results lie in ``root``."""
        common = ("--seed", str(seed), "--output_dir", str(root), "--threads", "1",
                  *(("--preset", preset) if preset else ()))
        return cls(table, common, quick, base_of(preset))

    def of_arm(self, arm: Arm, root: Path, needs: tuple[Path, ...], seed: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        line = shlex.split(self.filled(arm.make, root=shlex.quote(str(root))))
        quick = self.table.quick.get(arm.name, self.table.quick.get(line[0], ""))
        line += shlex.split(str(quick)) if self.quick else []
        return (*line, *self.common), {"name": f"s{seed}_{arm.name}", "arm": arm.name, "seed": seed, "needs": needs,
                                       "makes": manifest_of(arm, root), **self.cost(arm.cost)}

    def of_endpoint(self, endpoint: Endpoint, arm: Arm, root: Path, seed: int, table: Table
                    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        samples = self.table.quick.get("samples", endpoint.samples) if self.quick else endpoint.samples
        here = {"run": arm.run, "folder": arm.folder, "samples": samples}
        # of a weighted sum, what it is the sum of
        parts = [arm] if arm.make else [table.arms[name] for name in arm.needs]
        needs = [manifest_of(part, root) for part in parts]
        for after in endpoint.after:
            whose, other = whose_endpoint(after, arm.name)
            read = table.arms[whose]
            needs.append(root / table.endpoints[other].makes.format(**here | {"run": read.run, "folder": read.folder}))
        words = shlex.split(self.filled(f"{endpoint.run} {arm.scored}", root=shlex.quote(str(root)), **here))
        # without prompts of its own number an endpoint has none to make fewer
        words += ["--num_samples", str(samples)] if self.quick and endpoint.samples is None else []
        return (*words, *self.common), {
            "name": f"s{seed}_{arm.name}__{endpoint.name}", "arm": arm.name, "seed": seed,
            "needs": tuple(path for path in needs if path), "makes": root / endpoint.makes.format(**here),
            **self.cost(endpoint.cost)}

    def filled(self, line: str, **more: Any) -> str:
        adapted = ",".join(f"{self.base}+{name}" for name in self.table.experts)
        here = {"base": self.base, "experts": ",".join(self.table.experts), "adapted": adapted, **more}
        # a shared word may hold a place of the line's own
        return line.format(**{name: str(words).format(**here) for name, words in self.table.words.items()}, **here)

    def cost(self, kind: str) -> dict[str, Any]:
        known = self.table.costs.get(kind, {})
        # a quick step is mostly its start
        return {"seconds": min(known.get("seconds", 0), 15) if self.quick else known.get("seconds", 0),
                "memory_mb": known.get("memory_mb", 1000), "disk_mb": known.get("disk_mb", 1)}
