"""Checkpoints to be subtracted, under one set of names: what a merge finds equal, a difference must find equal, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from errors import UserError
from models.checkpoints.configs import compare
from models.checkpoints.heads import settle_copies
from models.checkpoints.names import computed, views

if TYPE_CHECKING:
    from models.checkpoints.reader import Checkpoint


def matched(checkpoints: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The checkpoints under the first one's names, and remarks on what was matched or left out.

    Left out are buffers that only some hold and that a model computes, and copies of tied embeddings. Each result shares
    the files of its checkpoint, which stays the one to close.

    Raises:
        UserError: they are different architectures.
    """
    order = list(checkpoints)
    problems: list[str] = []
    notes: list[str] = []
    compare(checkpoints, order, problems, notes)
    if problems:
        raise UserError(*problems)
    seen = views(checkpoints, order, notes)
    settle_copies(seen, notes)
    shared = set.intersection(*(set(view.tensors) for view in seen.values()))
    buffers: list[str] = []
    for view in seen.values():
        own = [name for name, info in view.tensors.items() if name not in shared and computed(info)]
        buffers += own
        for name in own:
            del view.tensors[name]
    if buffers:
        notes.append(f"{len(dict.fromkeys(buffers))} buffers that only some models hold (e.g. {buffers[0]}) are left out: a "
                     "model computes them when it is loaded")
    found = {name: replace(checkpoints[name], tensors=dict(sorted(view.tensors.items()))) for name, view in seen.items()}
    return found, notes
