"""Heads and embeddings that are one matrix in some inputs and two in others: what is a copy, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from models.checkpoints.configs import ties_head
from models.checkpoints.names import EMBEDDINGS, HEADS, View


def settle_copies(views: Mapping[str, View], notes: list[str]) -> None:
    """Leave out copies of a tied embedding that only some inputs hold; the views change in place.

    Older files hold ``shared`` and ``encoder.embed_tokens``, or a tied head beside its embedding; newer ones hold one of
    them. A copy is left out where its bytes are the other's, and where its model ties it.
    """
    for pattern, tied in ((EMBEDDINGS, lambda view: True), (HEADS, lambda view: ties_head(view.checkpoint.config))):
        for name in _on_some(views, pattern):
            for model, view in views.items():
                # the bytes first: whether a silent configuration ties is a question to transformers
                if name in view.tensors and view.copies_embedding(name) and tied(view):
                    view.ignored.add(view.tensors.pop(name).name)
                    notes.append(f"{name} of {model} is a copy of its tied embedding: left out")


def settle_heads(views: Mapping[str, View], order: Sequence[str], policy: str, problems: list[str],
                 notes: list[str]) -> None:
    """What to do where some inputs have a head of their own and others tie it; the anchor's view loses or keeps its own."""
    for head in _on_some(views, HEADS):
        own = {model: head in views[model].tensors for model in order}
        lost = [m for m in order if not own[m] and ties_head(views[m].checkpoint.config) is False]
        if lost:
            # its embedding is not its head: lending it would merge two different things
            problems += [f"{m} holds no {head}, and its config.json does not tie it to the embedding: it was saved from a "
                         "class without a head; save it again with AutoModelForCausalLM, as "
                         f"{next(n for n in order if own[n])} was" for m in lost]
        elif not policy:
            problems.append("heads differ: " + ", ".join(f"{m} {'has its own' if o else 'ties it'}" for m, o in own.items())
                            + "; choose --tied_heads base (as in the base) or untie (every input gets a head of its own)")
        elif policy == "untie" and not own[order[0]]:
            problems.append(f"--tied_heads untie: {order[0]} ties its head, so its layout has none; name an untied model "
                            "first")
        else:
            notes.append(f"--tied_heads {policy}: a tied input lends its embedding as head")
        if policy == "base" and not own[order[0]]:
            for model in order[1:]:
                view = views[model]
                if head in view.tensors:
                    view.ignored.add(view.tensors.pop(head).name)


def _on_some(views: Mapping[str, View], pattern: re.Pattern[str]) -> list[str]:
    """Names of this kind that some inputs have and others lack."""
    found = dict.fromkeys(name for view in views.values() for name in view.find(pattern))
    return [name for name in found if not all(name in view.tensors for view in views.values())]
