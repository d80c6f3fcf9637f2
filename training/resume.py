"""Which checkpoint a run goes on from: the newest whole one of the same configuration, or the one that was asked for."""

from __future__ import annotations

import json
import logging
import math
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
                 files: Sequence[str], places: Sequence[tuple[str, str]] = (), processes: int = 1) -> str | None:
    """The checkpoint to go on from; None to start anew, where older checkpoints are removed.

    Args:
        asked: --resume_from_checkpoint: a folder; True, there must be one; False, start anew; None, go on where one is.
        files: what a checkpoint of this training holds beside its state.
        places: as ``fault`` takes them.
        processes: how many train; another number may go on where a step has as many rows.

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
    settings = _of_a_step(settings, processes)
    if given is not None and (wrong := fault(given, files, places)):
        raise UserError(f"--resume_from_checkpoint {asked}: {wrong}; give the folder of a whole checkpoint of this "
                        "training, or true for this run's newest")
    own = given if given is not None and given.parent == folder.resolve() else None
    if own is not None:
        # one of this run's own: it tells where to go on, not what the run is
        kept = {k: v for k, v in settings["training_arguments"].items() if k != _PATH}
        settings = {**settings, "training_arguments": kept}
    if checkpoints and not args.overwrite:
        if problem := _another(record, settings):
            raise UserError(f"{folder}: {problem}")
        if own is not None:
            return _resuming(own)
        if asked is not False:
            for path in reversed(checkpoints):
                if not (wrong := fault(path, files, places)):
                    return _resuming(path)
                log.warning("%s: %s; passed over", path, wrong)
            if asked is not True:
                log.warning("%s: no checkpoint is whole; training starts anew", folder)
    elif own is not None:
        raise UserError(f"--resume_from_checkpoint {asked}: --overwrite removes this checkpoint; drop one of the two")
    if asked is True:
        raise UserError(f"--resume_from_checkpoint true: {folder} holds no whole checkpoint; drop it to start anew")
    if manifest.is_main():
        for old in checkpoints:
            manifest.remove(old)
        # before the first step, so that the checkpoints of a run that was killed at any moment can be told from another's
        manifest.write_json(record, settings)
    return _resuming(given) if given else None


#: Together with the number of processes they say how many rows a step has, however these are shared out.
_SHARED_OUT = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _of_a_step(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """The settings of a run on several processes: with their number. One process needs none, and its records had none."""
    return settings if processes == 1 else {**settings, "processes": processes}


def _another(record: Path, settings: dict[str, Any]) -> str:
    """Why checkpoints with this record are not of this configuration; empty: they are."""
    if not record.is_file():
        return "holds checkpoints of another configuration; use another --run_name, or --overwrite"
    old = json.loads(record.read_text(encoding="utf-8"))
    if any(name not in settings or name not in old for name in _SHARED_OUT):
        rows = [1, 1]
    else:
        rows = [math.prod(int(s.get(name, 1)) for name in (*_SHARED_OUT, "processes")) for s in (old, settings)]
    # how the rows of a step are shared out changes nothing: what they are together does
    same = {name: settings[name] for name in _SHARED_OUT if name in settings} | {"processes": settings.get("processes", 1)}
    if manifest.differing({**old, **same}, settings):
        return "holds checkpoints of another configuration; use another --run_name, or --overwrite"
    if rows[0] != rows[1]:
        return (f"holds checkpoints of steps of {rows[0]} rows (--per_device_train_batch_size x --gradient_accumulation_"
                f"steps x processes), and these would have {rows[1]}; give values that make {rows[0]}, or use another "
                "--run_name, or --overwrite")
    return ""


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


def fault(folder: Path, files: Sequence[str], places: Sequence[tuple[str, str]] = ()) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: it is whole. Headers and JSON are read, no values.

    Args:
        places: pairs of which one must be there: a file of whole tensors, or a folder of parts.
    """
    if not folder.is_dir():
        return "no such folder"
    if missing := [name for name in (_STATE, *files) if not (folder / name).is_file()]:
        return f"{', '.join(missing)} missing"
    if missing := [file for file, parts in places if not (folder / file).is_file() and not any((folder / parts).glob("*"))]:
        return f"{', '.join(missing)} missing"
    # as many processes wrote parts as wrote random states
    writers = len(list(folder.glob("rng_*.safetensors")))
    if short := [parts for _, parts in places if 0 < len(list((folder / parts).glob("*.safetensors"))) < writers]:
        return f"parts of {', '.join(short)} missing"
    for path in sorted(folder.rglob("*")):
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
