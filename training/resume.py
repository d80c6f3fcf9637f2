"""Which checkpoint a run goes on from: the newest whole one of the same configuration, or the one that was asked for."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import manifest
from errors import UserError
from flags import AlignArgs
from models.checkpoints.header import read_header

log = logging.getLogger(__name__)
_STATE = "trainer_state.json"
_PATH = "resume_from_checkpoint"


def checkpoint_folder(args: AlignArgs) -> Path:
    return args.results / "checkpoints" / args.name


def resume_point(args: AlignArgs, settings: dict[str, Any], asked: str | bool | None,
                 files: Sequence[str]) -> str | None:
    """The checkpoint to go on from; None to start anew, where older checkpoints are removed.

    Args:
        asked: --resume_from_checkpoint: a folder; True, there must be one; False, start anew; None, go on where one is.
        files: what a checkpoint of this training holds beside its state.

    Raises:
        UserError: there are checkpoints of another configuration under this name and ``--overwrite`` is off; what was
            asked for is not there or not whole.
    """
    folder = checkpoint_folder(args)
    record = folder / "settings.json"
    checkpoints = numbered(folder)
    if manifest.is_main():
        # what a killed process was writing or removing
        for hidden in folder.glob(".checkpoint-*"):
            manifest.remove(hidden)
    given = Path(asked).expanduser().resolve() if isinstance(asked, str) and asked else None
    if given is not None and (wrong := fault(given, files)):
        raise UserError(f"--resume_from_checkpoint {asked}: {wrong}; give the folder of a whole checkpoint of this "
                        "training, or true for this run's newest")
    own = given is not None and given.parent == folder.resolve()
    if own:
        # one of this run's own: it tells where to go on, not what the run is
        kept = {k: v for k, v in settings["training_arguments"].items() if k != _PATH}
        settings = {**settings, "training_arguments": kept}
    if checkpoints and not args.overwrite:
        if not manifest.same_settings(record, settings):
            raise UserError(f"{folder}: holds checkpoints of another configuration; use another --run_name, or --overwrite")
        if own:
            return _resuming(given)
        if asked is not False:
            for path in reversed(checkpoints):
                if not (wrong := fault(path, files)):
                    return _resuming(path)
                log.warning("%s: %s; passed over", path, wrong)
            if asked is not True:
                log.warning("%s: no checkpoint is whole; training starts anew", folder)
    elif own:
        raise UserError(f"--resume_from_checkpoint {asked}: --overwrite removes this checkpoint; drop one of the two")
    if asked is True:
        raise UserError(f"--resume_from_checkpoint true: {folder} holds no whole checkpoint; drop it to start anew")
    if manifest.is_main():
        for old in checkpoints:
            manifest.remove(old)
        # before the first step, so that the checkpoints of a run that was killed at any moment can be told from another's
        manifest.write_json(record, settings)
    return _resuming(given) if given else None


def _resuming(path: Path) -> str:
    log.info("resuming from %s", path)
    return str(path)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal() and path.is_dir()]
    # by number: as text checkpoint-1000 comes before checkpoint-200
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def rotate(folder: Path, limit: int | None, kept: Collection[str]) -> None:
    """Remove the oldest checkpoints until ``limit`` are left, or as many as must be kept by name; None: remove none."""
    found = numbered(folder)
    removable = [path for path in found if path.name not in kept]
    surplus = len(found) - max(limit, len(kept)) if limit else 0
    for path in removable[: max(surplus, 0)]:
        # hidden first: a kill in between must not leave half of one under its name
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path.replace(hidden)
        shutil.rmtree(hidden)


def fault(folder: Path, files: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: it is whole. Headers and JSON are read, no values."""
    if not folder.is_dir():
        return "no such folder"
    if missing := [name for name in (_STATE, *files) if not (folder / name).is_file()]:
        return f"{', '.join(missing)} missing"
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with path.open("rb") as stream:
                    read_header(stream, path)
        except UserError as error:
            return f"damaged: {error.problems[0].removeprefix(f'{path}: ')} ({path.name})"
        except ValueError:
            return f"damaged: {path.name} is no JSON"
    return None
