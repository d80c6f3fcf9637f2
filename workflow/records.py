"""Which steps are finished: by their manifests and what was recorded of them, never by time stamps.

    python -m workflow.records --plan results/leaderboard/workflow/plan.json --step s42_average

writes down, when a step's command has ended well, what it was asked (its settings, its preset's values included), the hashes
of the manifests that it read, and that of the manifest that it made. A step is finished while all of these are so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import manifest
from errors import UserError, exit_on_user_error
from workflow.plan import Step

#: States of a step: finished; there without a record (its command's own rule decides, in seconds); to be made; there,
#: but with other settings or made of something else than now.
DONE, UNRECORDED, NEW, OUTDATED = "finished", "unrecorded", "new", "outdated"


def record_path(folder: Path, name: str) -> Path:
    """Where a step's record lies; ``folder`` is the workflow's own."""
    return folder / "records" / f"{name}.json"


def states(steps: Iterable[Step], folder: Path, anew: Container[str] = ()) -> dict[str, str]:
    """Name -> state of every step. The order must be that of ``plan.steps``: what is needed comes first.

    Args:
        folder: of the workflow.
        anew: arms that count as outdated, whatever was recorded.
    """
    found: dict[str, str] = {}
    # files that will be made anew in this call
    changing: set[Path] = set()
    for step in steps:
        state = _state(step, folder)
        # what is made of something that is about to change is outdated, whatever its record says
        if state != NEW and (step.arm in anew or changing.intersection(step.needs)):
            state = OUTDATED
        if state in (NEW, OUTDATED):
            changing.add(step.makes)
        found[step.name] = state
    return found


def _state(step: Step, folder: Path) -> str:
    if not step.makes.is_file():
        return NEW
    try:
        record = json.loads(record_path(folder, step.name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return UNRECORDED
    except ValueError:
        # damaged: as if it had not been written
        return UNRECORDED
    if not isinstance(record, dict) or record != _content(step.settings, step.needs, step.makes, folder):
        return OUTDATED
    return DONE


def _content(settings: Any, needs: Iterable[Path], makes: Path, folder: Path) -> dict[str, Any]:
    # relative: results that are moved stay finished; a file that is not there has no hash, which no record holds
    made_of = {os.path.relpath(path, folder): _hash(path) for path in needs}
    return {"settings": dict(settings), "made_of": made_of, "makes": _hash(makes)}


def _hash(path: Path) -> str | None:
    return manifest.sha256(path) if path.is_file() else None


def write(plan: Path, name: str) -> Path:
    """Record that a step of a written plan is finished.

    Raises:
        UserError: no such step, or its command left nothing behind.
    """
    steps = {step["name"]: step for step in json.loads(plan.read_text(encoding="utf-8"))["steps"]}
    if name not in steps:
        raise UserError(f"--step {name}: not in {plan}")
    step = steps[name]
    if not Path(step["makes"]).is_file():
        raise UserError(f"--step {name}: its command ended without {step['makes']}")
    path = record_path(plan.parent, name)
    manifest.write_json(path, _content(step["settings"], map(Path, step["made_of"]), Path(step["makes"]), plan.parent))
    # behind the record: what snakemake takes for finished is so
    _set(Path(step["mark"]))
    return path


def mark_path(folder: Path, name: str) -> Path:
    """The empty file by which snakemake tells that a step has ended well."""
    return folder / "marks" / name


def mark(steps: Iterable[Step], states: Mapping[str, str], folder: Path) -> None:
    """Set the marks of the finished steps, remove all others: at each start they follow from manifests and records."""
    shutil.rmtree(folder / "marks", ignore_errors=True)
    (folder / "marks").mkdir(parents=True)
    for step in steps:
        if states[step.name] == DONE:
            _set(mark_path(folder, step.name))


def _set(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record that a step of the leaderboard's graph is finished.")
    parser.add_argument("--plan", type=Path, required=True, help="the written plan")
    parser.add_argument("--step", required=True, help="name of the step")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        write(args.plan, args.step)


if __name__ == "__main__":
    main()
