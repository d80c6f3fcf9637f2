"""Recipes of a merge: our YAML and mergekit's, read into one dataclass, every error with its line. Loads no torch.

Ours::

    method: ties                      # a row of METHODS
    base: my-base                     # run or folder; where the method works on differences from a base
    inputs:
      - model: helpful                # run or folder
        weight: 0.5                   # a parameter of this input: a number,
        density: [0.2, 0.5]           # a gradient over the layers (linear between evenly spaced points),
      - model: harmless               # or values by tensor name: the first key that stands in the name counts
        density: {self_attn: 0.2, mlp: [0.5, 0.3], "*": 0.3}
    parameters: {lambda: 1.0}         # of the whole merge, or of every input that has no value of its own
    dtype: bfloat16                   # of the file written; sums are fp32 whatever it is
    vocab: base                       # base | union | pad: how embedding rows are matched
    tokenizer: base                   # base | union, or the base's name

mergekit's has ``merge_method`` where ours has ``method``. The same rules hold in both: an input's value goes before its
slice's, that before the recipe's, that before the default. What we do not support is an error, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from models.merging.recipe_values import (
    MAX_BYTES,
    Item,
    MethodSpec,
    Report,
    Scalar,
    Setting,
    nearest,
    read_setting,
    read_yaml,
    shown,
    value_at,
)

DTYPES = ("float32", "float16", "bfloat16")
VOCABS = ("base", "union", "pad")
_OURS = ("method", "base", "inputs", "parameters", "dtype", "vocab", "tokenizer")
_MERGEKIT = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
             "tokenizer")
#: keys that one may expect and that we do not support -> what to do instead
_REFUSED = {
    "modules": "merge one module at a time, with models or slices",
    "chat_template": "the result keeps the base's (without a base: the first model's); edit its tokenizer_config.json",
    "residual_weight": "delete it; mergekit has no use for it either",
    "random_seed": "give it with --seed",
    "seed": "give it with --seed",
    "tokens": "tokens are matched by their text",
    "pad_to_multiple_of": "rows are as many as the tokens need",
}
#: parameters of mergekit that change how it computes, not what
_WITHOUT_EFFECT = {"int8_mask": "masks are exact here whatever their type"}


@dataclass(frozen=True)
class Source:
    """A model of a slice: its layers first..last-1 (None: all of them) and its own parameters."""

    model: str
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Slice:
    """Layers of the result, made from as many layers of every source."""

    sources: tuple[Source, ...]
    base_model: str | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Recipe:
    """A merge as asked for.

    Args:
        whole: whole models are merged: one slice without layer ranges.
        dtype: the type to write unless ``out_dtype`` names another; one of DTYPES. None: as the base.
        vocab: how embedding rows are matched, one of VOCABS; None: not said.
        tokenizer_source: "base" (the base's, without one the first model's) or "union"; None: not said.
        text: the file as read, for the manifest.
        mergekit: whether it is a recipe of mergekit's, whose defaults then hold.
    """

    method: str
    base_model: str | None
    slices: tuple[Slice, ...]
    whole: bool
    parameters: Mapping[str, Setting]
    dtype: str | None
    out_dtype: str | None
    vocab: str | None
    tokenizer_source: str | None
    text: str
    path: Path
    mergekit: bool = False


def parameter(recipe: Recipe, slice_: Slice, source: Source | None, name: str, tensor: str, t: float,
              default: Any) -> Scalar | Any:
    """A parameter's value for one tensor at position t: the source's, else the slice's, else the recipe's, else the default.

    A setting none of whose filters matches the tensor gives way to the next, as in mergekit.
    """
    for level in (source, slice_, recipe):
        if level is not None and name in level.parameters:
            value = value_at(level.parameters[name], tensor, t)
            if value is not None:
                return value
    return default


def read_recipe(path: Path, methods: Mapping[str, MethodSpec]) -> Recipe:
    """Read and check a recipe of either dialect; models are not opened.

    Args:
        methods: what every method takes.

    Raises:
        UserError: every problem of the file, in order of its lines.
    """
    text, report = _text(path), Report(path)
    top = read_yaml(text, report)
    if not isinstance(top.value, dict):
        report.error(top, "a recipe is a mapping; it starts with merge_method: (mergekit's) or method: (ours)")
        report.raise_any()
    # both at once would leave open whose rules hold; near misses name the key that was meant
    theirs = "merge_method" in top.value
    if theirs == ("method" in top.value):
        near = next((f"{key}{hint}; " for key in top.value if (hint := nearest(key, ("merge_method", "method")))), "")
        has = "" if theirs else f"; {near}has neither"
        report.error(top, f"needs either merge_method (mergekit's recipe) or method (ours){has or ', not both'}")
        report.raise_any()
    fields = _Reader(report, methods, theirs).recipe(top)
    report.raise_any()
    return Recipe(**fields, text=text, path=path, mergekit=theirs)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        # read one byte too many instead of asking for the size: a pipe or /dev/zero has none
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES // 1000} kB; not a recipe")
        # editors on Windows put a mark before the text, which YAML would take for a key's first letter
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the recipe's file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; give a recipe in YAML") from None


def _given(keys: Mapping[str, Item], name: str, parent: Item) -> Item:
    """The item of a key that must be there; an empty one at its parent's line when it is missing."""
    return keys.get(name, Item(None, parent.line, f"{parent.name}.{name}" if parent.name else name))


class _Reader:
    """One file of one dialect; ``spec`` is None after an unknown method, whose parameters cannot be checked."""

    def __init__(self, report: Report, methods: Mapping[str, MethodSpec], theirs: bool) -> None:
        self.report, self.methods, self.theirs = report, methods, theirs
        self.method, self.spec = "", None

    def recipe(self, top: Item) -> dict[str, Any]:
        keys = self.keys(top, _MERGEKIT if self.theirs else _OURS)
        self.method = self.word(keys.get("merge_method" if self.theirs else "method"), self.methods) or ""
        self.spec = self.methods.get(self.method)
        base = self.model(keys.get("base_model" if self.theirs else "base"))
        if self.theirs and "slices" in keys and "models" in keys:
            self.report.error(keys["slices"], "models and slices exclude each other; keep one")
        whole = "slices" not in keys
        name = ("models" if whole else "slices") if self.theirs else "inputs"
        entries = self.entries(_given(keys, name, top))
        if whole:
            slices = (self.whole(keys.get(name, top), entries, base),)
        else:
            slices = tuple(slice_ for entry in entries if (slice_ := self.slice(entry, base)))
        # not an error: with or without the base the sum is the same
        if base and self.spec and not self.spec.takes_base and not any(s.model == base for p in slices for s in p.sources):
            self.report.note(keys["base_model" if self.theirs else "base"], f"{self.method} takes no base: {base} lends "
                             "its configuration and tokenizer only")
        # mergekit computes in dtype; fp32 throughout is never less exact
        if "dtype" in keys and "out_dtype" in keys:
            self.report.note(keys["dtype"], "no effect beside out_dtype: sums are fp32, out_dtype is written")
        first = next((p.base_model or p.sources[0].model for p in slices if p.sources), None)
        vocab, tokenizer = self.vocabulary(keys, base or first)
        return dict(method=self.method, base_model=base, slices=slices, whole=whole,
                    parameters=self.parameters(keys.get("parameters")), dtype=self.dtype(keys.get("dtype")),
                    out_dtype=self.dtype(keys.get("out_dtype")), vocab=vocab, tokenizer_source=tokenizer)

    def whole(self, item: Item, entries: list[Item], base: str | None) -> Slice:
        slice_ = Slice(tuple(s for e in entries if (s := self.source(e, ranged=False))), None, {})
        self.check(item, slice_, entries, base)
        return slice_

    def slice(self, entry: Item, base: str | None) -> Slice | None:
        if not self.is_mapping(entry):
            return None
        keys = self.keys(entry, ("sources", "base_model", "parameters"))
        entries = self.entries(_given(keys, "sources", entry))
        slice_ = Slice(tuple(s for e in entries if (s := self.source(e, ranged=True))), self.model(keys.get("base_model")),
                     self.parameters(keys.get("parameters")))
        self.check(entry, slice_, entries, slice_.base_model or base)
        return slice_

    def source(self, entry: Item, ranged: bool) -> Source | None:
        if not self.is_mapping(entry):
            return None
        if self.theirs:
            keys = self.keys(entry, ("model", "layer_range", "parameters") if ranged else ("model", "parameters"))
            parameters = self.parameters(keys.get("parameters"), own=True)
        else:
            keys = entry.value
            # ours has no parameters section within an input: what is not the model is a parameter
            inline = {key: value for key, value in keys.items() if key != "model"}
            parameters = self.parameters(Item(inline, entry.line, entry.name), own=True)
        model = self.model(_given(keys, "model", entry))
        layers = self.layers(_given(keys, "layer_range", entry)) if ranged else None
        return Source(model, layers, parameters) if model and (layers or not ranged) else None

    def check(self, item: Item, slice_: Slice, entries: list[Item], base: str | None) -> None:
        """Whether a slice's sources fit each other and the method."""
        missing = bool(entries and self.spec and self.spec.needs_base and not base)
        if missing:
            self.report.error(item, f"{self.method} needs a base; add {'base_model' if self.theirs else 'base'}: MODEL")
        if len(slice_.sources) < len(entries) or not entries:
            return  # a source that could not be read has its own error, and counts would be wrong without it
        lengths = {s.layer_range[1] - s.layer_range[0] for s in slice_.sources if s.layer_range}
        if len(lengths) > 1:
            counts = ", ".join(f"{s.model} {s.layer_range[1] - s.layer_range[0]}" for s in slice_.sources)
            self.report.error(item, f"sources of one slice need as many layers each; here: {counts}")
        seen: dict[str, Source] = {}
        for source, entry in zip(slice_.sources, entries, strict=True):
            if source.model in seen and seen[source.model].layer_range != source.layer_range:
                self.report.error(entry, f"{source.model} stands twice in one slice, with other layers; "
                                         "not supported; give every slice a model once")
            # a list counts as often as it says; mergekit keys its inputs by name and drops the second
            elif source.model in seen:
                self.report.note(entry, f"{source.model} is listed twice and counts twice; in mergekit it would not")
            seen.setdefault(source.model, source)
        if self.spec and not missing:
            self.check_method(item, slice_, entries, base, self.spec)

    def check_method(self, item: Item, slice_: Slice, entries: list[Item], base: str | None, spec: MethodSpec) -> None:
        # recipes of mergekit list the base among the models or leave it out; both mean the same
        listed = [s for s in slice_.sources if spec.takes_base and s.model == base]
        count = len(slice_.sources) - len(listed)
        beside = " beside the base" if listed or spec.needs_base else ""
        if count < spec.min_inputs or count > (spec.max_inputs or count):
            same = spec.max_inputs == spec.min_inputs
            most = "" if same else f" to {spec.max_inputs}" if spec.max_inputs else " or more"
            self.report.error(item, f"{self.method} takes {spec.min_inputs}{most} model(s){beside}; here: {count}")
        for source, entry in zip(slice_.sources, entries, strict=True):
            if source in listed and source.parameters:
                self.report.note(entry, f"{', '.join(source.parameters)} of the base: no effect, its own difference is zero")
        if base and spec.takes_base and not listed and len({s.layer_range for s in slice_.sources}) > 1:
            self.report.error(item, f"the base {base} is not among the sources, and their layers differ; "
                                    "list it with the layer_range that they are compared with")

    def parameters(self, item: Item | None, own: bool = False) -> dict[str, Setting]:
        """A ``parameters`` section; ``own``: of one input, which may hold per-input parameters only."""
        if item is None or self.spec is None or not self.is_mapping(item):
            return {}
        settings: dict[str, Setting] = {}
        for name, entry in item.value.items():
            # refusing what changes nothing would stop recipes that are right
            if self.theirs and name in _WITHOUT_EFFECT:
                self.report.note(entry, f"no effect: {_WITHOUT_EFFECT[name]}")
            elif name not in self.spec.parameters:
                allowed = ", ".join(sorted(self.spec.per_input if own else self.spec.parameters)) or "none"
                self.report.error(entry, f"{self.method} has no such parameter{nearest(name, self.spec.parameters)}; "
                                         f"allowed: {allowed}")
            elif own and name not in self.spec.per_input:
                self.report.error(entry, "one value serves the whole merge; give it under the recipe's parameters")
            else:
                value = read_setting(entry, self.spec.parameters[name], self.report, mapping_is_filters=not self.theirs)
                if value is not None:
                    settings[name] = value
        return settings

    def vocabulary(self, keys: Mapping[str, Item], anchor: str | None) -> tuple[str | None, str | None]:
        """(vocab, tokenizer_source), each derived from the other where only one is given."""
        item = keys.get("tokenizer")
        if self.theirs:
            if item is not None and "tokenizer_source" in keys:
                self.report.error(item, "tokenizer and tokenizer_source exclude each other; keep one")
            if item is not None and self.is_mapping(item):
                # mergekit's default for a tokenizer section that names no source
                item = self.keys(item, ("source",)).get("source", Item("union", item.line, f"{item.name}.source"))
            item = keys.get("tokenizer_source", item)
        tokenizer = None if item is None else item.value
        if isinstance(tokenizer, str) and tokenizer.removeprefix("model:") == anchor:
            tokenizer = "base"
        if tokenizer not in (None, "base", "union"):
            allowed = ", ".join(["base", "union", *([anchor] if anchor else [])])
            self.report.error(item, f"{shown(tokenizer)}: not supported; rows follow the base, without one the first "
                                    f"model; allowed: {allowed}; or make that model the base")
            return None, None
        vocab = self.word(keys.get("vocab"), VOCABS) or tokenizer
        if vocab and tokenizer and (vocab == "union") != (tokenizer == "union"):
            self.report.error(item, f"tokenizer {tokenizer} does not fit vocab {vocab}: union needs both")
        return vocab, tokenizer or (vocab and ("union" if vocab == "union" else "base"))

    def keys(self, item: Item, allowed: Iterable[str]) -> dict[str, Item]:
        """A mapping's items that hold something; an error for every key that is not allowed."""
        for key, entry in item.value.items():
            if key not in allowed:
                why = f"not supported; {_REFUSED[key]}" if key in _REFUSED else f"unknown key{nearest(key, allowed)}"
                self.report.error(entry, f"{why}; allowed keys: {', '.join(allowed)}")
        return {key: entry for key, entry in item.value.items() if key in allowed and entry.value is not None}

    def entries(self, item: Item) -> list[Item]:
        if isinstance(item.value, list) and item.value:
            return item.value
        kinds = {"slices": "slices", "models": "models (or slices instead)"}
        self.report.error(item, f"needs a list of {kinds.get(item.name, 'models')}, one or more")
        return []

    def is_mapping(self, item: Item) -> bool:
        if not isinstance(item.value, dict):
            self.report.error(item, "needs 'key: value' lines")
        return isinstance(item.value, dict)

    def model(self, item: Item | None) -> str | None:
        if item is None:
            return None
        name = item.value
        if not isinstance(name, str) or not name.strip():
            self.report.error(item, "needs a model: text that names a folder or run (a number in quotes)")
        # mergekit's MODEL+LORA and MODEL@REVISION; read as folder names they would be "not found"
        elif self.theirs and "+" in name:
            self.report.error(item, f"{name}: an adapter on top of a model is not supported; merge it into the model first")
        elif self.theirs and "@" in name:
            self.report.error(item, f"{name}: a revision is not supported; name the folder of that revision")
        else:
            return name
        return None

    def layers(self, item: Item) -> tuple[int, int] | None:
        numbers = [e.value for e in item.value] if isinstance(item.value, list) else []
        if len(numbers) != 2 or not all(type(n) is int for n in numbers):
            self.report.error(item, "needs two whole numbers: [first layer, layer behind the last]")
        elif not 0 <= numbers[0] < numbers[1]:
            self.report.error(item, f"{numbers}: needs 0 <= first < last")
        else:
            return numbers[0], numbers[1]
        return None

    def dtype(self, item: Item | None) -> str | None:
        return self.word(item, DTYPES, lambda text: text.removeprefix("torch."))

    def word(self, item: Item | None, allowed: Iterable[str], clean: Callable[[str], str] = str) -> str | None:
        if item is None:
            return None
        value = clean(shown(item.value))
        if value in allowed:
            return value
        self.report.error(item, f"{value}: not known{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
        return None
