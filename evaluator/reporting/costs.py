"""What a row costs: seconds and memory to make it, what it stores and meets beside its base; from manifests and headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import manifest
from errors import UserError
from evaluator.reporting.formats import markdown_lines
from evaluator.reporting.run_records import json_object
from flags.mixture import mixture_parts
from models.checkpoints.header import read_header
from models.run_folders import ADAPTER, MOE

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line

#: Settings that name runs: an adapter that is gone on with, a mask that is read out, what is merged.
_NAMING = ("init_adapter", "mask", "models")
#: Columns -> title, unit's divisor, digits.
COLUMNS: dict[str, tuple[str, float, int]] = {
    "seconds": ("to make it, s", 1, 0), "all_seconds": ("with all that it is made of, s", 1, 0),
    "memory_mb": ("peak memory, MB", 1, 0), "stored": ("stored beside the base, M", 1e6, 1),
    "active": ("active beside the base, M", 1e6, 1), "tokens_per_second": ("training tokens/s", 1, 0)}
NOTE = (
    "To make it: the command that made the run, on the machine of its manifest; with all that it is made of: the runs "
    "among its inputs too, each once. Peak memory: of that command. Stored: numbers in the run's files; a whole model "
    "stands in the place of its base. Active: numbers that a token meets beside the base's weights (of a fused MoE the "
    "router, k of its experts and LoRA on attention); adapters, their sums and merges are in the weights. Means over "
    "seeds.")


@dataclass(frozen=True)
class Cost:
    """A run's cost; None: not known.

    Args:
        seconds, memory_mb: of the command that made it; memory in MiB.
        all_seconds: with those of its ancestors, each once.
        stored, active: numbers beside the base's: in its files, and those that a token meets.
        tokens_per_second: of its training.
    """

    seconds: float | None = None
    all_seconds: float | None = None
    memory_mb: float | None = None
    stored: float | None = None
    active: float | None = None
    tokens_per_second: float | None = None


def of_run(results: Path, run: str) -> Cost:
    """The cost of a run of a results folder; of the base all is zero, of a run whose folder is gone nothing is known."""
    if run == "base":
        return Cost(0, 0, None, 0, 0)
    try:
        parts = [name for name, _ in mixture_parts(run)]
    except ValueError:
        return Cost()
    if parts:
        # a weighted sum has no folder: it costs what its parts cost, and nothing more
        found = [_stored(results / "outputs" / name)[0] for name in parts]
        made = _ancestors(results, parts)
        return Cost(0, sum(made.values()) if made else None, None, None if None in found else sum(found), 0)
    content = _manifest(results / "outputs" / run)
    stored, active = _stored(results / "outputs" / run)
    made = _ancestors(results, [run])
    return Cost(_number(content, "seconds"), sum(made.values()) if made else None, _number(content, "peak_memory_mb"),
                stored, active, _number(content.get("metrics") or {}, "tokens_per_second"))


def _ancestors(results: Path, runs: Iterable[str]) -> dict[str, float]:
    """Run -> seconds, of these runs and of all of their parents in the same results folder."""
    found: dict[str, float] = {}
    waiting = list(runs)
    while waiting:
        name = waiting.pop()
        content = _manifest(results / "outputs" / name)
        seconds = _number(content, "seconds")
        if name in found or seconds is None:
            continue
        found[name] = seconds
        waiting += _parents(content)
    return found


def _parents(content: Mapping[str, Any]) -> list[str]:
    """Names of the runs that a run is made of: its parents, and those that its settings name (MODEL+ADAPTER are two).

    By name: results may have been moved since.
    """
    config = content.get("config")
    named = [config.get(setting) for setting in _NAMING] if isinstance(config, Mapping) else []
    words = [*map(str, content.get("parents") or ()), *(word for text in named if isinstance(text, str)
                                                        for word in re.split("[,+]", text) if word.strip())]
    return [Path(word.strip()).name for word in words]


def _stored(folder: Path) -> tuple[float | None, float | None]:
    """Numbers in a run's weight files, and those of them that a token meets beside the base's."""
    total = active = 0.0
    files = sorted(folder.glob("*.safetensors"))
    config = json_object(folder / MOE)
    experts, top_k = len(config.get("experts") or ()), config.get("top_k")
    for file in files:
        try:
            with file.open("rb") as stream:
                tensors, _ = read_header(stream, file)
        except (UserError, OSError):
            return None, None
        for info in tensors.values():
            size = prod(info.shape)
            total += size
            if config:
                # factors of all experts in one tensor (experts, ..), of which a token meets k
                stacked = len(info.shape) == 3 and info.shape[0] == experts
                active += size * top_k / experts if stacked and isinstance(top_k, int) else size
    if not files or not any((folder / name).is_file() for name in (ADAPTER, MOE, "config.json")):
        return None, None
    return total, active


def _manifest(folder: Path) -> dict[str, Any]:
    return json_object(folder / manifest.MANIFEST)


def _number(content: Mapping[str, Any], name: str) -> float | None:
    value = content.get(name) if isinstance(content, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def of_lines(lines: Sequence[Line], roots: Sequence[Path]) -> dict[str, Cost]:
    """Label -> mean cost over a row's runs and results folders; what one of them does not know is unknown.

    Numbers in weight files are the same in every seed: those that still have them tell for those whose weights are gone.
    """
    return {line.label: _mean([of_run(root, run) for run in line.run.split("+") for root in roots]) for line in lines}


def _mean(costs: Sequence[Cost]) -> Cost:
    values = {name: [getattr(cost, name) for cost in costs] for name in COLUMNS}
    for name in ("stored", "active"):
        values[name] = [value for value in values[name] if value is not None] or [None]
    return Cost(**{name: None if None in found else sum(found) / len(found) for name, found in values.items()})


def text(value: float | None, column: str) -> str:
    """A number of a column as people read it, in the column's unit; empty where it is not known."""
    _, unit, digits = COLUMNS[column]
    return "" if value is None else f"{value / unit:,.{digits}f}"


def markdown(costs: Mapping[str, Cost]) -> list[str]:
    """The costs as a section of a page."""
    rows = [[label, *(text(value, name) for name, value in asdict(cost).items())] for label, cost in costs.items()]
    return ["", "## Cost", "", *markdown_lines(["model", *(title for title, _, _ in COLUMNS.values())], rows), "", NOTE]


def as_data(costs: Mapping[str, Cost]) -> dict[str, dict[str, float | None]]:
    """The costs as JSON has them: label -> name -> number."""
    return {label: asdict(cost) for label, cost in costs.items()}
