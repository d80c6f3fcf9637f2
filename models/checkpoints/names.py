"""Tensors of several checkpoints found under one set of names: the anchor's.

One model is saved in several ways: from the base class (``layers.0``) or with its head (``model.layers.0``), by an older
transformers with buffers that a newer one computes, with or without a second copy of a tied embedding. None of that is a
difference between models. What differs in truth is told by name. Reads headers; values only to prove a copy a copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.checkpoints.reader import Checkpoint, TensorInfo

HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDINGS = re.compile(r"(^|[._])(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_tokens_per_layer)\.weight$"
                        r"|(^|^model\.|^transformer\.)shared\.weight$")
#: A bias over the vocabulary.
HEAD_BIASES = re.compile(r"(^|\.)(lm_head|embed_out|predictions)\.bias$|(^|\.)final_logits_bias$")
_LAYER = re.compile(r"^(?P<before>(?:.*?\.)?)(?P<index>\d+)(?P<after>\..+)$")
#: Buffers that a model computes anew when it is made: those of rotary embeddings, of positions, of causal masks.
_COMPUTED = re.compile(r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|position_ids|token_type_ids|relative_position_index)$")
_MASKS = re.compile(r"\.(attn|attention|self_attention)\.(bias|masked_bias)$")
#: Names that transformers gives the parts of models of vision and language: before 4.52, since.
_RENAMED = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
            ("visual.", "model.visual."), ("model.", "model.language_model."))


@dataclass
class View:
    """A checkpoint's tensors by the anchor's names; ``ignored``: own names of copies and buffers that nothing needs."""

    checkpoint: Checkpoint
    tensors: dict[str, TensorInfo]
    ignored: set[str] = field(default_factory=set)

    def find(self, pattern: re.Pattern[str]) -> list[str]:
        return [name for name in self.tensors if pattern.search(name)]

    def embedding(self) -> TensorInfo | None:
        """The embedding of the model's words."""
        return next((self.tensors[name] for name in self.find(EMBEDDINGS) if "per_layer" not in name), None)

    def copies_embedding(self, name: str) -> bool:
        """Whether a head or embedding is, byte by byte, another one of this checkpoint: the copy of a tied one."""
        info = self.tensors[name]
        others = [n for n in (*self.find(EMBEDDINGS), *self.find(HEADS)) if n != name]
        return any(self.checkpoint.equal(info, self.tensors[n]) for n in others)


def layer_of(tensor: str) -> int | None:
    """The layer number in a tensor's name; None for embeddings, final norm and head."""
    place = _LAYER.match(tensor)
    return int(place["index"]) if place else None


def stack_of(tensor: str) -> str | None:
    """What stands before the layer number in a tensor's name: "model.layers."."""
    place = _LAYER.match(tensor)
    return place["before"] if place else None


def at_layer(tensor: str, layer: int) -> str:
    place = _LAYER.match(tensor)
    if place is None:
        raise ValueError(f"{tensor}: is in no layer")
    return f"{place['before']}{layer}{place['after']}"


def stacks(tensors: Iterable[str]) -> dict[str, int]:
    """Stack -> how many layers it has: one more than the largest number."""
    counts: dict[str, int] = {}
    for name in tensors:
        if place := _LAYER.match(name):
            counts[place["before"]] = max(counts.get(place["before"], 0), int(place["index"]) + 1)
    return counts


def elsewhere(tensor: str, stack: str, others: Iterable[str]) -> bool:
    """Whether a tensor outside all layers belongs to another part than a stack does, as an image tower's norms do."""
    # "model.layers." lies in "model.", beside "model.vision_tower."
    home = stack.rstrip(".").rpartition(".")[0]
    home = f"{home}." if home else ""
    rooms = [home + other.removeprefix(home).partition(".")[0] + "." for other in others
             if other != stack and other.startswith(home)]
    return not HEADS.search(tensor) and (not tensor.startswith(home) or tensor.startswith(tuple(rooms)))


def computed(info: TensorInfo) -> bool:
    """Whether a tensor is a buffer that its model computes anew, so that a file may lack it."""
    # a mask is a square under two leading axes, or one number; a bias of that name is a vector
    mask = _MASKS.search(info.name) and (len(info.shape) in (0, 4) or info.shape == (1,))
    return bool(mask or _COMPUTED.search(info.name))


def by_vocabulary(tensor: str) -> bool:
    return bool(HEADS.search(tensor) or EMBEDDINGS.search(tensor))


def views(checkpoints: Mapping[str, Checkpoint], order: list[str], notes: list[str]) -> dict[str, View]:
    """Every checkpoint under the names of the first of ``order``; a note tells of each that was renamed."""
    first = checkpoints[order[0]]
    found = {order[0]: View(first, dict(first.tensors))}
    for model in order[1:]:
        tensors = checkpoints[model].tensors
        renamed, rules = _renamed(tensors, first.tensors)
        found[model] = View(checkpoints[model], {renamed[name]: info for name, info in tensors.items()})
        if rules:
            notes.append(f"{model} names its tensors otherwise than {order[0]} ({'; '.join(rules)}): matched")
    return found


def _renamed(mine: Mapping[str, TensorInfo], its: Mapping[str, TensorInfo]) -> tuple[dict[str, str], list[str]]:
    """Own name -> name among ``its``, and the rules that were applied; names that need or find no rule stay."""
    wanted = {_pattern(name) for name in its}
    names, rules = {name: name for name in mine}, []
    # a few rules at most: a model of vision and language has one for each of its parts
    for _ in range(len(_RENAMED)):
        best, rule = names, ""
        strange = [now for now in names.values() if _pattern(now) not in wanted]
        if not strange:
            break
        for said, apply in _rules(strange, its):
            tried = {own: _kept(now, apply, wanted) for own, now in names.items()}
            if len(set(tried.values())) == len(tried) and _hits(tried, wanted) > _hits(best, wanted):
                best, rule = tried, said
        if not rule:
            break
        names = best
        rules.append(rule)
    return names, rules


def _kept(name: str, apply: Callable[[str], str], wanted: set[str]) -> str:
    """The name by the rule where that is wanted and the old one is not."""
    new = apply(name)
    return new if _pattern(new) in wanted and _pattern(name) not in wanted else name


def _hits(names: Mapping[str, str], wanted: set[str]) -> int:
    return sum(_pattern(name) in wanted for name in names.values())


def _rules(strange: list[str], its: Iterable[str]) -> Iterable[tuple[str, Callable[[str], str]]]:
    """(how it is told, rule) of the ways in which names may have come to differ."""
    for prefix in dict.fromkeys(_prefixes(its)):
        yield f"without {prefix}", partial(_swapped, "", prefix)
    for prefix in dict.fromkeys(_prefixes(strange)):
        yield f"with {prefix} before them", partial(_swapped, prefix, "")
    for old, new in (*_RENAMED, *((new, old) for old, new in _RENAMED)):
        yield f"{old} for {new}", partial(_swapped, old, new)


def _swapped(old: str, new: str, name: str) -> str:
    """A name with another beginning, where it has the old one."""
    return new + name.removeprefix(old) if name.startswith(old) else name


def _prefixes(names: Iterable[str]) -> Iterable[str]:
    """The first word of every name, and the first two."""
    for name in names:
        words = name.split(".")
        yield from (".".join(words[:n]) + "." for n in (1, 2) if len(words) > n and not words[n - 1].isdigit())


def _pattern(name: str) -> str:
    """A name without its numbers: layers of any depth are one."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
