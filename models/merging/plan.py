"""Match the tensors of several checkpoints, explain what does not fit, and resolve parameters. Reads headers only.

(Of two equal tensors of one input, the copy of a tied embedding, it reads the bytes that prove it.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from models.checkpoints.configs import compare, section, written
from models.checkpoints.heads import settle_copies, settle_heads
from models.checkpoints.names import (
    EMBEDDINGS,
    HEAD_BIASES,
    HEADS,
    View,
    at_layer,
    by_vocabulary,
    computed,
    elsewhere,
    layer_of,
    stack_of,
    stacks,
    views,
)
from models.merging.layer_settings import mixed, sliced
from models.merging.methods import Method
from models.merging.recipes import Recipe, Slice, Source, parameter
from models.merging.tokens.rows import TokenRows, rows_of
from models.merging.tokens.vocabulary import RowMap

if TYPE_CHECKING:
    from pathlib import Path

    from models.checkpoints.reader import Checkpoint, TensorInfo

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
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
    """What was matched: jobs in order of name, remarks for the user, the output's rows and configuration."""

    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    rows: RowMap | None
    config: Mapping[str, Any]

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
        defaults: parameters that the recipe's dialect fills in where the method asks for them.
        tokenizer: the folder of the tokenizer that the recipe's tokenizer section names.

    Raises:
        UserError: everything that does not fit, each with the policy or step that resolves it.
    """
    first = anchor(recipe)
    order = [first, *(name for name in checkpoints if name != first)]
    problems: list[str] = []
    notes: list[str] = []
    # models of other architectures differ in every tensor: one sentence instead of a hundred
    compare(checkpoints, order, problems, notes)
    if problems:
        raise UserError(*problems)
    seen = views(checkpoints, order, notes)
    settle_copies(seen, notes)
    rows = rows_of(recipe, seen, order, policies.vocab, tokenizer, problems, notes)
    settle_heads(seen, order, policies.tied_heads, problems, notes)
    jobs, unmatched, buffers = [], [], []
    for name, position, slice_, sources in _outputs(recipe, seen, first, problems):
        pieces = {}
        for model, tensor in sources.items():
            piece = _piece(seen[model], tensor, None if rows is None else (rows, order.index(model)))
            if piece is not None:
                pieces[model] = replace(piece, model=model)
        # go on: all tensors without a partner are told together
        if len(pieces) < len(sources):
            # a file without them is as good: the model computes them
            if pieces and all(computed(piece.info) for piece in pieces.values()):
                buffers.append(name)
            else:
                unmatched += [f"{m} has no tensor {tensor}" for m, tensor in sources.items() if m not in pieces]
            continue
        shape = _shape(name, pieces, rows, problems)
        job = None if shape is None else (
            _job(recipe, method, slice_, name, position, pieces, shape, policies, defaults, problems))
        if job is not None:
            jobs.append(replace(job, tokens=rows) if isinstance(rows, TokenRows) and by_vocabulary(name) else job)
    # a recipe of slices leaves layers out on purpose; whole models must be used up
    used = {(id(p.checkpoint), p.info.name) for job in jobs for p in job.pieces}
    if recipe.whole and not unmatched:
        # an input of which nothing is merged lends its names and configuration: a base that the method has no use for
        for model in (m for m in order if any(id(checkpoints[m]) == checkpoint for checkpoint, _ in used)):
            left = {n: i for n, i in seen[model].tensors.items() if (id(checkpoints[model]), i.name) not in used}
            buffers += [name for name, info in left.items() if computed(info)]
            unmatched += [f"{model} has {name}, the output has no place for it" for name, info in left.items()
                          if not computed(info)]
    # after other problems, tensors that do not match are their consequence
    if unmatched and not problems:
        problems += [*unmatched[:_SHOWN], f"{len(unmatched)} tensors have no partner: the inputs must share one base "
                     "(the same layers, the same biases); merge models fine-tuned from the same checkpoint"]
    config: dict[str, Any] = {}
    if not problems:
        config = _config(recipe, seen, first, jobs, rows, problems, notes)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if buffers:
        notes.append(f"{len(dict.fromkeys(buffers))} buffers that only some inputs hold (e.g. {buffers[0]}) are left out: a "
                     "model computes them when it is loaded")
    if recipe.mergekit and method.elects and any(j.parameters.normalize and min(j.parameters.weight) < 0 for j in jobs):
        notes.append("negative weights and normalize: what agrees is divided by the sum of its |weight|; mergekit divides "
                     "by the signed sum, which turns the sign of an entry that a negative weight alone holds; normalize: "
                     "false gives mergekit's numbers")
    # not an error: fp32 holds every 16-bit value, so that mixing loses nothing
    kinds = Counter(piece.info.dtype for job in jobs for piece in job.pieces)
    if len(kinds) > 1:
        notes.append("input types: " + ", ".join(f"{k} x {n}" for k, n in sorted(kinds.items())) + "; summed in fp32")
    return MergePlan(tuple(jobs), tuple(notes), rows, config)


def _config(recipe: Recipe, seen: Mapping[str, View], first: str, jobs: Sequence[Job], rows: RowMap | None,
            problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The result's config.json; empty where the anchor has none."""
    own = seen[first].checkpoint.config
    if not own:
        notes.append(f"{first} has no config.json, so the result has none; put the model's own beside it")
        return {}
    parts = {model: section(view.checkpoint.config) for model, view in seen.items()}
    part = dict(parts[first])
    if not recipe.whole:
        try:
            origins = []
            for slice_ in recipe.slices:
                lead = _lead(slice_, first)
                origins += [(lead.model, layer) for layer in range(*lead.required_range)]
                for layers in zip(*(range(*s.required_range) for s in slice_.sources), strict=True):
                    both = [(s.model, layer) for s, layer in zip(slice_.sources, layers, strict=True)]
                    if (why := mixed(parts, both)) and len(both) > 1:
                        notes.append(f"layers of different kinds become one ({why}): the result keeps {lead.model}'s")
            part = sliced(parts, first, origins)
        except UserError as error:
            problems += error.problems
            return {}
    kinds = {job.dtype for job in jobs if job.dtype in DTYPES}
    # of mixed types the configuration keeps what it said
    dtype = DTYPES[kinds.pop()] if len(kinds) == 1 else None
    return written(own, part, dtype, rows.rows if rows else None, any(HEADS.search(job.name) for job in jobs))


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


def _lead(slice_: Slice, first: str) -> Source:
    """The source whose names and settings the slice's layers take: the anchor where it is listed, else the first."""
    return next((source for source in slice_.sources if source.model == first), slice_.sources[0])


def _outputs(recipe: Recipe, seen: Mapping[str, View], first: str,
             problems: list[str]) -> Iterable[tuple[str, float, Slice, dict[str, str]]]:
    """(output name, position t in 0..1, slice, {model: tensor name}) of every output tensor.

    As in mergekit, t runs from 0 to 1 over the layers of a slice, and is 0 before them. Behind them it is 0 as well in a
    recipe of mergekit's (since its 0.1.4), 1 in ours and by flags, unless ``head_at`` says where.
    """
    names = seen[first].tensors
    depths = stacks(names)
    picked = None if recipe.whole else _picked(recipe, seen, first, problems)
    # embeddings belong to the first slice, final norm and head to the last
    for name in (name for name in names if layer_of(name) is None):
        early = bool(EMBEDDINGS.search(name))
        slice_ = recipe.slices[0 if early or (picked and len(depths) > 1 and elsewhere(name, picked, depths)) else -1]
        t = 0.0 if early or recipe.head_at == "first" else 1.0
        yield name, t, slice_, {model: name for model in _members(slice_, recipe)}
    # whole stacks: every layer has the names that it has, for the first of a decoder may be unlike the others
    slice_ = recipe.slices[0]
    layers: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None and (stack := stack_of(name)) is not None and stack != picked:
            layers.setdefault(layer, []).append((name, stack))
    for layer, tensors in sorted(layers.items()):
        for name, stack in tensors:
            yield name, _position(layer, depths[stack]), slice_, {m: name for m in _members(slice_, recipe)}
    if picked is None:
        return
    start = 0
    for slice_ in recipe.slices:
        ranges = {source.model: source.required_range for source in slice_.sources}
        lead = _lead(slice_, first)
        low, high = lead.required_range
        for model in _members(slice_, recipe):
            # a base that the slice does not list is compared at the layers of the first source
            ranges.setdefault(model, slice_.sources[0].required_range)
        for i in range(high - low):
            # those of a slice are numbered anew
            for name in (n for n in seen[lead.model].tensors if stack_of(n) == picked and layer_of(n) == low + i):
                yield (at_layer(name, start + i), _position(i, high - low), slice_,
                       {model: at_layer(name, bottom + i) for model, (bottom, _) in ranges.items()})
        start += high - low


def _position(layer: int, depth: int) -> float:
    return layer / (depth - 1) if depth > 1 else 1.0


def _picked(recipe: Recipe, seen: Mapping[str, View], first: str, problems: list[str]) -> str | None:
    """The stack of layers that layer ranges speak of; a problem where that is not one, or shorter than a range."""
    depths = stacks(seen[first].tensors)
    known = section(seen[first].checkpoint.config)
    # beside the words' layers a model may have those of images, projectors or an encoder: the configuration tells them apart
    fitting = [s for s, n in depths.items() if n == known.get("num_hidden_layers")] if len(depths) > 1 else list(depths)
    fitting = [s for s in fitting if not re.search("vision|visual|image|audio", s)]
    if len(fitting) != 1:
        problems.append(f"slices: {first} has {'stacks' if depths else 'no stack'} of layers{': ' if depths else ''}"
                        f"{', '.join(f'{s}0..{n - 1}' for s, n in depths.items())}; a layer_range is for a model with one; "
                        "merge whole models (models: without layer_range)")
        return None
    for slice_ in recipe.slices:
        for source in slice_.sources:
            depth, behind = stacks(seen[source.model].tensors).get(fitting[0], 0), source.required_range[1]
            if behind > depth:
                problems.append(f"layer_range {list(source.required_range)}: {source.model} has no tensor "
                                f"{fitting[0]}{behind - 1}.*; its layers are 0 to {depth - 1}, so that the second number is "
                                f"at most {depth}")
    return fitting[0]


def _members(slice_: Slice, recipe: Recipe) -> list[str]:
    base = slice_.base_model or recipe.base_model
    return list(dict.fromkeys([*([base] if base else []), *(source.model for source in slice_.sources)]))


def _piece(view: View, tensor: str, rows: tuple[RowMap, int] | None) -> Piece | None:
    info = view.tensors.get(tensor)
    if info is None and HEADS.search(tensor):
        # a tied head is its embedding
        info = view.embedding()
    if info is None:
        return None
    # rows that stand where they should are read as one piece, which is much faster
    if rows and by_vocabulary(tensor) and (isinstance(rows[0], TokenRows) or not rows[0].trivial(rows[1])):
        return Piece(view.checkpoint, info, rows[0].sources[rows[1]])
    return Piece(view.checkpoint, info)


def _shape(name: str, pieces: Mapping[str, Piece], rows: RowMap | None, problems: list[str]) -> tuple[int, ...] | None:
    if rows and HEAD_BIASES.search(name):
        problems.append(f"{name}: has an entry for each token, and entries are not matched by token, rows are; merge models "
                        "of one vocabulary")
        return None
    # a table may have fewer rows than the embedding that the rows were counted by
    short = [m for m, p in pieces.items() if p.rows is not None and p.rows.max(initial=-1) >= p.info.shape[0]]
    if short:
        problems.append(f"{name}: of {short[0]} has {pieces[short[0]].info.shape[0]} rows, its embedding has more, so that "
                        "rows cannot be matched by token; merge models of one vocabulary")
        return None
    shapes = {model: ((rows.rows, *piece.info.shape[1:]) if rows and by_vocabulary(name) else piece.info.shape)
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
    # once: weights that hold for a tensor hold for many
    fault = parameters.fault() if dtype in FLOATS and hasattr(parameters, "fault") else None
    if fault and not any(problem.endswith(fault) for problem in problems):
        problems.append(f"{recipe.path if recipe.text else '--parameters'}: {name}: {fault}")
    experts = tuple(pieces[source.model] for source in members)
    mapped = any(piece.rows is not None for piece in pieces.values())
    return Job(name, dtype, shape, pieces[base] if base else None, experts, parameters,
               mapped or method.rows(parameters))
