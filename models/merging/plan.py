"""Match the tensors of several checkpoints, explain what does not fit, and resolve parameters. Reads headers only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from models.merging.methods import Method
from models.merging.recipes import Recipe, Slice, parameter
from models.merging.token_rows import TokenRows, token_rows
from models.merging.vocabulary import RowMap, differing, match_rows, read_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from models.checkpoints.reader import Checkpoint, TensorInfo

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SHAPE_KEYS = ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads")
QUIET_KEYS = ("rope_theta", "rms_norm_eps", "rope_scaling", "max_position_embeddings", "sliding_window")
HEAD = "lm_head.weight"
_LAYER = re.compile(r"^(?P<before>(?:.*?\.)?)(?P<index>\d+)(?P<after>\..+)$")
_EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
_SHOWN = 6


@dataclass(frozen=True)
class Piece:
    """One input of one output tensor: where its values are, and its rows in the output's order when those differ."""

    checkpoint: Checkpoint
    info: TensorInfo
    rows: np.ndarray | None = None
    #: the recipe's name of the input
    model: str = ""


@dataclass(frozen=True)
class Job:
    """One output tensor: its inputs and the method's parameters, resolved for this tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Piece | None
    experts: tuple[Piece, ...]
    parameters: Any
    by_rows: bool
    #: how a recipe's tokenizer section completes its rows
    tokens: TokenRows | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def copied(self) -> bool:
        """Whether it holds no numbers to merge (index buffers): the first input's values are kept."""
        return self.dtype not in FLOATS


@dataclass(frozen=True)
class MergePlan:
    """What was matched: jobs in order of name, remarks for the user, the output's rows and layers."""

    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    rows: RowMap | None
    layers: int | None
    drop_head: bool

    @property
    def bytes_in(self) -> int:
        return sum(piece.info.nbytes for job in self.jobs for piece in job.pieces)

    @property
    def bytes_out(self) -> int:
        return sum(prod(job.shape) * FLOATS.get(job.dtype, job.experts[0].info.nbytes // max(prod(job.shape), 1))
                   for job in self.jobs)


@dataclass(frozen=True)
class Policies:
    """What to do where inputs disagree; empty: explain and stop."""

    vocab: str = ""
    tied_heads: str = ""
    out_dtype: str = ""


def match(recipe: Recipe, method: Method, checkpoints: Mapping[str, Checkpoint], policies: Policies,
          defaults: Mapping[str, Any], tokenizer: Path | None = None) -> MergePlan:
    """Pair the tensors of the inputs by name and layer.

    Args:
        checkpoints: by the name that the recipe uses.
        tokenizer: the folder of the tokenizer that the recipe's tokenizer section names.
        defaults: parameters that the recipe's dialect fills in where the method asks for them.

    Raises:
        UserError: everything that does not fit, each with the policy or step that resolves it.
    """
    first = anchor(recipe)
    order = [first, *(name for name in checkpoints if name != first)]
    # models of other architectures differ in every tensor: one sentence instead of a hundred
    problems, notes = _compare_configs(checkpoints, order)
    if problems:
        raise UserError(*problems)
    if recipe.tokens is None:
        rows = _rows(checkpoints, order, policies.vocab, problems, notes)
    else:
        rows = token_rows(recipe.tokens, order, [checkpoints[m].folder for m in order], _sizes(checkpoints, order),
                          recipe.base_model, tokenizer)
    drop_head = _heads(checkpoints, order, policies.tied_heads, problems, notes)
    jobs, unmatched = [], []
    for name, position, slice_, sources in _outputs(recipe, checkpoints[first]):
        if drop_head and name == HEAD:
            continue
        pieces = {}
        for model, tensor in sources.items():
            piece = _piece(checkpoints[model], tensor, rows and (rows, order.index(model)))
            if piece is None:
                unmatched.append(f"{model} has no tensor {tensor}")
            else:
                pieces[model] = replace(piece, model=model)
        # go on: all tensors without a partner are told together
        if len(pieces) < len(sources):
            continue
        shape = _shape(name, pieces, rows, problems)
        job = None if shape is None else (
            _job(recipe, method, slice_, name, position, pieces, shape, policies, defaults, problems))
        if job is not None and isinstance(rows, TokenRows) and _by_vocabulary(name):
            job = replace(job, tokens=rows)
        if job is not None:
            jobs.append(job)
    # a recipe of slices leaves layers out on purpose; whole models must be used up
    used = {(id(p.checkpoint), p.info.name) for job in jobs for p in job.pieces}
    if recipe.whole and not unmatched:
        unmatched += [f"{model} has {name}, the output has no place for it" for model in order
                      for name in checkpoints[model].tensors
                      if (id(checkpoints[model]), name) not in used and not (drop_head and name == HEAD)]
    # after other problems, tensors that do not match are their consequence
    if unmatched and not problems:
        problems += [*unmatched[:_SHOWN], f"{len(unmatched)} tensors have no partner: the inputs must share one base "
                     "(the same layers, the same biases); merge models fine-tuned from the same checkpoint"]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    # not an error: fp32 holds every 16-bit value, so that mixing loses nothing
    kinds = Counter(piece.info.dtype for job in jobs for piece in job.pieces)
    if len(kinds) > 1:
        notes.append("input types: " + ", ".join(f"{k} x {n}" for k, n in sorted(kinds.items())) + "; summed in fp32")
    return MergePlan(tuple(jobs), tuple(notes), rows, None if recipe.whole else _layer_count(recipe), drop_head)


def anchor(recipe: Recipe) -> str:
    """The input whose names, configuration and vocabulary the output takes: the base, else the first model."""
    return recipe.base_model or recipe.slices[0].base_model or recipe.slices[0].sources[0].model


def models(recipe: Recipe) -> list[str]:
    """Every input's name, the anchor first."""
    names = [anchor(recipe)]
    for slice_ in recipe.slices:
        names += [slice_.base_model] if slice_.base_model else []
        names += [source.model for source in slice_.sources]
    return list(dict.fromkeys(names))


def layer_of(tensor: str) -> int | None:
    """The layer number in a tensor's name; None for embeddings, final norm and head."""
    place = _LAYER.match(tensor)
    return int(place["index"]) if place else None


def _at_layer(tensor: str, layer: int) -> str:
    place = _LAYER.match(tensor)
    return f"{place['before']}{layer}{place['after']}"


def _layer_count(recipe: Recipe) -> int:
    return sum(slice_.sources[0].layer_range[1] - slice_.sources[0].layer_range[0] for slice_ in recipe.slices)


def _outputs(recipe: Recipe, first: Checkpoint) -> Iterable[tuple[str, float, Slice, dict[str, str]]]:
    """(output name, position t in 0..1, slice, {model: tensor name}) of every output tensor.

    As in mergekit, t runs from 0 to 1 over the layers of a slice, and is 0 before them. Behind them it is 0 as well in a
    recipe of mergekit's (since its 0.1.4), 1 in ours and by flags, unless ``head_at`` says where.
    """
    count = 1 + max((n for n in map(layer_of, first.tensors) if n is not None), default=-1)
    # embeddings belong to the first slice, final norm and head to the last
    outside = [name for name in first.tensors if layer_of(name) is None]
    for name in outside:
        early = bool(_EMBEDDING.search(name))
        slice_ = recipe.slices[0 if early else -1]
        t = 0.0 if early or recipe.head_at == "first" else 1.0
        yield name, t, slice_, {model: name for model in _members(slice_, recipe)}
    start = 0
    for slice_ in recipe.slices:
        ranges = {source.model: source.layer_range or (0, count) for source in slice_.sources}
        own = next(iter(ranges.values()))
        for model in _members(slice_, recipe):
            # a base that the slice does not list is compared at the layers of the first source
            ranges.setdefault(model, own)
        length = own[1] - own[0]
        # all layers of a decoder have the names of layer 0; those of a slice are numbered anew
        template = [name for name in first.tensors if layer_of(name) == 0]
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            for name in template:
                yield (_at_layer(name, start + i), t, slice_,
                       {model: _at_layer(name, low + i) for model, (low, _) in ranges.items()})
        start += length


def _members(slice_: Slice, recipe: Recipe) -> list[str]:
    base = slice_.base_model or recipe.base_model
    return list(dict.fromkeys([*([base] if base else []), *(source.model for source in slice_.sources)]))


def _piece(checkpoint: Checkpoint, tensor: str, rows: tuple[RowMap, int] | None) -> Piece | None:
    info = checkpoint.tensors.get(tensor)
    if info is None and tensor == HEAD:
        # a tied head is its embedding
        info = next((i for n, i in checkpoint.tensors.items() if _EMBEDDING.search(n)), None)
    if info is None:
        return None
    # rows that stand where they should are read as one piece, which is much faster
    if rows and _by_vocabulary(tensor) and (isinstance(rows[0], TokenRows) or not rows[0].trivial(rows[1])):
        return Piece(checkpoint, info, rows[0].sources[rows[1]])
    return Piece(checkpoint, info)


def _by_vocabulary(tensor: str) -> bool:
    return tensor == HEAD or bool(_EMBEDDING.search(tensor))


def _shape(name: str, pieces: Mapping[str, Piece], rows: RowMap | None, problems: list[str]) -> tuple[int, ...] | None:
    shapes = {model: ((rows.rows, *piece.info.shape[1:]) if rows and _by_vocabulary(name) else piece.info.shape)
              for model, piece in pieces.items()}
    kinds = set(shapes.values())
    if len(kinds) == 1:
        return kinds.pop()
    problems.append(f"{name}: shapes differ: " + ", ".join(f"{model} {list(s)}" for model, s in shapes.items())
                    + "; merge models of one architecture")
    return None


def _job(recipe: Recipe, method: Method, slice_: Slice, name: str, t: float, pieces: dict[str, Piece],
         shape: tuple[int, ...], policies: Policies, defaults: Mapping[str, Any], problems: list[str]) -> Job | None:
    base = slice_.base_model or recipe.base_model
    # a method of the sphere or the plain mean takes the base as one more input, where the recipe lists it
    members = [s for s in slice_.sources if method.base == "no" or s.model != base]
    if method.base == "no":
        base = None
    dtype = pieces[base].info.dtype if base else next(iter(pieces.values())).info.dtype
    # index buffers keep their type whatever the weights get
    if dtype in FLOATS and policies.out_dtype:
        dtype = policies.out_dtype
    values = {}
    for key, item in method.fields().items():
        given = [parameter(recipe, slice_, source, key, name, t, defaults.get(key, item.default))
                 for source in (members if item.metadata["each"] else members[:1])]
        if any(value is None for value in given):
            problems.append(f"{key}: not given for {name}; give it in the recipe or with --{key}")
            return None
        # types and ranges were checked with the recipe, which knows nothing of the words that a method takes
        choices = item.metadata["choices"]
        if choices and given[0] not in choices:
            problems.append(f"{key}: {given[0]} is not known; allowed: {', '.join(choices)}")
            return None
        values[item.name] = tuple(map(float, given)) if item.metadata["each"] else given[0]
    parameters = method.parameters(**values)
    experts = tuple(pieces[source.model] for source in members)
    mapped = any(piece.rows is not None for piece in pieces.values())
    return Job(name, dtype, shape, pieces[base] if base else None, experts, parameters,
               mapped or method.rows(parameters))


def _compare_configs(checkpoints: Mapping[str, Checkpoint], order: Sequence[str]) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    first = checkpoints[order[0]].config
    for name in order[1:]:
        other = checkpoints[name].config
        if not first or not other:
            continue
        # depth alone may differ: slices pick layers
        differ = [f"{k} {first.get(k)} and {other.get(k)}" for k in SHAPE_KEYS if first.get(k) != other.get(k)]
        if differ and not ("num_hidden_layers" in differ[0] and len(differ) == 1):
            problems.append(f"{order[0]} and {name} are different architectures ({'; '.join(differ)}); "
                            "merge models fine-tuned from the same checkpoint")
        quiet = [f"{k} {first.get(k)} and {other.get(k)}" for k in QUIET_KEYS if first.get(k) != other.get(k)]
        if quiet:
            notes.append(f"{order[0]} and {name} differ in {'; '.join(quiet)}: the result keeps {order[0]}'s")
    return problems, notes


def _sizes(checkpoints: Mapping[str, Checkpoint], order: Sequence[str]) -> list[int]:
    return [next((i.shape[0] for n, i in checkpoints[m].tensors.items() if _EMBEDDING.search(n)), 0) for m in order]


def _rows(checkpoints: Mapping[str, Checkpoint], order: Sequence[str], policy: str, problems: list[str],
          notes: list[str]) -> RowMap | None:
    """The inputs' vocabularies lined up; None when they agree already."""
    sizes = _sizes(checkpoints, order)
    tokens = [read_tokens(checkpoints[m].folder) for m in order]
    reasons = [f"{order[0]} has {sizes[0]} rows, {m} has {n}" for m, n in zip(order, sizes, strict=True) if n != sizes[0]]
    # equal sizes prove nothing: two tokenizers may number their pieces otherwise
    for model, known in zip(order[1:], tokens[1:], strict=True):
        if tokens[0] and known and (why := differing(tokens[0], known)):
            reasons.append(f"{order[0]} and {model}: {why}")
    if not reasons:
        return None
    if not policy:
        problems.append(f"vocabularies differ ({'; '.join(reasons[:_SHOWN])}); choose --vocab base (the tokens of "
                        f"{order[0]}, matched by text), union (added tokens of the others too), or pad (by index)")
        return None
    rows = match_rows(policy, sizes, tokens, order)
    notes.append(f"--vocab {policy}: {rows.rows} rows; a token that an input lacks takes the base's row, and one that the "
                 "base lacks too the mean of the inputs that have it")
    return rows


def _heads(checkpoints: Mapping[str, Checkpoint], order: Sequence[str], policy: str, problems: list[str],
           notes: list[str]) -> bool:
    """Whether the output drops its own head because the base ties it to the embedding."""
    own = {model: HEAD in checkpoints[model].tensors for model in order}
    if len(set(own.values())) == 1:
        return False
    if not policy:
        problems.append("heads differ: " + ", ".join(f"{m} {'has its own' if o else 'ties it'}" for m, o in own.items())
                        + "; choose --tied_heads base (as in the base) or untie (every input gets a head of its own)")
    elif policy == "untie" and not own[order[0]]:
        problems.append(f"--tied_heads untie: {order[0]} ties its head, so its layout has none; name an untied model first")
    else:
        notes.append(f"--tied_heads {policy}: a tied input lends its embedding as head")
    return policy == "base" and not own[order[0]]
