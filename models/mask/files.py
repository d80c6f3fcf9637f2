"""A mask on disk: mask.safetensors (the logits) and mask.json (what they mean), checked against their models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import manifest
from errors import UserError
from models.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from models.checkpoints.fingerprints import fingerprint, fingerprint_like
from models.mask.settings import Settings
from models.task_vectors import Model, misfits, open_model, provenance

LOGITS, FACTS = "mask.safetensors", "mask.json"
#: Of both files together; a reader refuses every other.
VERSION = 1


@dataclass(frozen=True)
class Mask:
    """A trained mask.

    Args:
        settings: what the logits mean.
        logits: tensor name -> (units,).
        aligned, tasks: how the models were named, and their hashes: {"name", "folder", "base", "adapter"}.
        training: what else is known of the training: steps, reference, temperature schedule.
    """

    settings: Settings
    logits: dict[str, Tensor]
    aligned: dict[str, Any]
    tasks: tuple[dict[str, Any], ...]
    training: dict[str, Any]


def identity(model: Model) -> dict[str, Any]:
    """A model's name, folder and hashes: of its checkpoint, and of its adapter where it is one."""
    return {"name": model.name, "folder": str(model.folder), "base": fingerprint(model.checkpoint.folder),
            "adapter": manifest.sha256(model.folder / ADAPTER_WEIGHTS) if model.adapter else None}


def save_mask(folder: Path, settings: Settings, logits: Mapping[str, Tensor], aligned: dict[str, Any],
              tasks: Sequence[dict[str, Any]], training: Mapping[str, Any]) -> None:
    """Write logits and facts; the facts last, so that a folder with mask.json is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    # in the type that they train in: a resumed run goes on from the same numbers
    save_file({name: value.detach().cpu().contiguous() for name, value in logits.items()}, folder / LOGITS)
    manifest.write_json(folder / FACTS, {
        "version": VERSION, "settings": settings.to_json(), "aligned": aligned, "tasks": list(tasks),
        "training": dict(training), "logits_sha256": manifest.sha256(folder / LOGITS)})


def read_mask(folder: Path) -> Mask:
    """Read a mask; a UserError when there is none, it is damaged, or the two files do not belong together."""
    import json

    if not (folder / FACTS).is_file() or not (folder / LOGITS).is_file():
        raise UserError(f"{folder}: holds no mask ({FACTS}, {LOGITS}); train one with align_basemodel.py --method mask")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        settings = Settings.from_json(facts["settings"])
        logits = load_file(folder / LOGITS)
        mask = Mask(settings, logits, facts["aligned"], tuple(facts["tasks"]), facts["training"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged mask ({type(error).__name__}: {error}); train it again") from None
    if facts.get("version") != VERSION:
        raise UserError(f"{folder / FACTS}: version {facts.get('version')}, this program reads {VERSION}")
    # another run's logits would fit, and mean something else
    if facts.get("logits_sha256") != manifest.sha256(folder / LOGITS):
        raise UserError(f"{folder}: {LOGITS} is not the file that {FACTS} was written with; train the mask again")
    return mask


def open_models(args: Any, aligned: str, tasks: Sequence[str], trust: bool, stack: ExitStack,
                ) -> tuple[Model, list[Model]]:
    """Open the aligned model and the tasks' and check by hash that each task was tuned from the aligned model.

    Args:
        aligned: run, folder or adapter; empty: --model_name_or_path itself.
        trust: accept tasks of which nothing records their origin.

    Raises:
        UserError: with every problem of every model.
    """
    flag = "--aligned" if aligned else "--model_name_or_path"
    aligned_model = open_model(aligned or args.model_name_or_path, args, flag, stack)
    task_models: list[Model] = []
    problems: list[str] = []
    for name in tasks:
        try:
            task = open_model(name, args, "--tasks", stack, base=aligned_model.checkpoint)
        except UserError as error:
            problems += error.problems
            continue
        task_models.append(task)
        problems += provenance(task, aligned_model, "--tasks", trust)
    problems += misfits(aligned_model, [(task, "--tasks") for task in task_models])
    if problems:
        raise UserError(*problems)
    return aligned_model, task_models


def check_models(mask: Mask, aligned: Model, tasks: Sequence[Model], where: str) -> None:
    """Refuse models that are not those the mask was trained on, by hash.

    Raises:
        UserError: names every model that differs.
    """
    problems = []
    if len(tasks) != len(mask.tasks):
        problems.append(f"{where}: was trained for {len(mask.tasks)} tasks "
                        f"({', '.join(t['name'] for t in mask.tasks)}), but {len(tasks)} are given")
    # not strict: a wrong number of tasks is a problem of its own, and those that are there are checked all the same
    expected = [("aligned model", mask.aligned, aligned),
                *(("task", facts, task) for facts, task in zip(mask.tasks, tasks, strict=False))]
    for role, facts, model in expected:
        hashes = identity(model)
        # a mask of an earlier version recorded the base in that version's way
        hashes["base"] = fingerprint_like(facts["base"], model.checkpoint.folder)
        for key in ("base", "adapter"):
            if facts[key] != hashes[key]:
                problems.append(f"{where}: was trained on another {role} ('{facts['name']}', {key} {str(facts[key])[:12]}), "
                                f"but '{model.name}' has {str(hashes[key])[:12]}; give the models that mask.json names")
    if problems:
        raise UserError(*problems)
