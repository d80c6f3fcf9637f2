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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError, nearest
from models.merging.mergekit_keys import EXTENSIONS, KEYS, OTHER_TOOLS, PARAMETERS, WITHOUT_EFFECT, slip
from models.merging.recipe_fields import Fields, given
from models.merging.recipe_tokens import TokenRules, read_chat_template, read_tokens_section
from models.merging.recipe_values import (
    MAX_BYTES,
    Item,
    MethodSpec,
    Report,
    Scalar,
    Setting,
    read_setting,
    read_yaml,
    shown,
    value_at,
)

VOCABS = ("base", "union", "pad")
#: Where on a gradient the final norm and the head lie: at its first value, as in mergekit since 0.1.4, or at its last.
HEAD_AT = ("first", "last")
_OURS = ("method", "base", "inputs", "parameters", "dtype", "vocab", "tokenizer", "head_at")


@dataclass(frozen=True)
class Source:
    """A model of a slice: its layers first..last-1 (None: all of them) and its own parameters."""

    model: str
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, Setting]

    @property
    def required_range(self) -> tuple[int, int]:
        """The layer range of a source of a slice; a ValueError where whole models are merged."""
        if self.layer_range is None:
            raise ValueError(f"{self.model}: all of its layers are merged")
        return self.layer_range


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
        module: parameters of mergekit's one module, between a slice's and the recipe's.
        head_at: one of HEAD_AT.
        adapters: name of a model with an adapter on it -> (model, adapter).
        tokens: what the tokenizer section asks for beyond base and union.
        chat_template: a template's text, or "auto": the commonest of the inputs; None: the base's.
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
    module: Mapping[str, Setting] = field(default_factory=dict)
    head_at: str = "last"
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    tokens: TokenRules | None = None
    chat_template: str | None = None


def parameter(recipe: Recipe, slice_: Slice, source: Source | None, name: str, tensor: str, t: float,
              default: Any) -> Scalar | Any:
    """A parameter's value for one tensor at position t: the source's, else the slice's, else the recipe's, else the default.

    A setting none of whose filters matches the tensor gives way to the next, as in mergekit.
    """
    levels = (source and source.parameters, slice_.parameters, recipe.module, recipe.parameters)
    for level in levels:
        if level and name in level:
            value = value_at(level[name], tensor, t)
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
        other = next((f"{key}: is a recipe of {tool}, not of this merge; " for key, tool in (
            OTHER_TOOLS.items()) if key in top.value), "")
        has = "" if theirs else f"; {other}{near}has neither"
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


class _Reader(Fields):
    """One file of one dialect; ``spec`` is None after an unknown method, whose parameters cannot be checked."""

    def __init__(self, report: Report, methods: Mapping[str, MethodSpec], theirs: bool) -> None:
        super().__init__(report, theirs)
        self.methods = methods
        self.method = ""
        self.spec: MethodSpec | None = None

    def recipe(self, top: Item) -> dict[str, Any]:
        keys = self.keys(top, KEYS["top"] + EXTENSIONS if self.theirs else _OURS)
        self.method = self.word(keys.get("merge_method" if self.theirs else "method"), self.methods) or ""
        self.spec = self.methods.get(self.method)
        base = self.model(keys.get("base_model" if self.theirs else "base"))
        module = self.module(keys)
        if self.theirs and "slices" in keys and "models" in keys:
            self.report.error(keys["slices"], "models and slices exclude each other; keep one")
        whole = "slices" not in keys
        name = ("models" if whole else "slices") if self.theirs else "inputs"
        entries = self.entries(given(keys, name, top))
        slices: tuple[Slice, ...]
        if whole:
            only = self.whole(keys.get(name, top), entries, base)
            slices = (self.with_base(keys, only, base, module) if self.theirs else only,)
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
        vocab, tokenizer, tokens = self.vocabulary(keys, base or first)
        template = read_chat_template(keys["chat_template"], self.report) if "chat_template" in keys else None
        return dict(method=self.method, base_model=base, slices=slices, whole=whole,
                    parameters=self.parameters(keys.get("parameters")), dtype=self.dtype(keys.get("dtype")),
                    out_dtype=self.dtype(keys.get("out_dtype")), vocab=vocab, tokenizer_source=tokenizer, module=module,
                    head_at=self.word(keys.get("head_at"), HEAD_AT) or ("first" if self.theirs else "last"),
                    adapters=self.adapters, tokens=tokens, chat_template=template)

    def module(self, keys: dict[str, Item]) -> dict[str, Setting]:
        """The parameters of mergekit's one module, whose models or slices take their place among the keys."""
        item = keys.pop("modules", None)
        if item is None or not self.is_mapping(item):
            return {}
        if len(item.value) != 1 or "models" in keys or "slices" in keys:
            self.report.error(item, "takes one module, and neither models nor slices beside it; merge models of several "
                                    "modules (vision towers) whole, with models")
            return {}
        (entry,) = item.value.values()
        inner = self.keys(entry, KEYS["module"]) if self.is_mapping(entry) else {}
        keys.update({name: inner[name] for name in ("models", "slices") if name in inner})
        return self.parameters(inner.get("parameters"))

    def with_base(self, keys: Mapping[str, Item], slice_: Slice, base: str | None, module: Mapping[str, Setting]) -> Slice:
        """A base that models does not list is one more model in mergekit, also where a method has no use for a base."""
        if not base or self.spec is None or self.spec.takes_base or any(s.model == base for s in slice_.sources):
            return slice_
        place = keys["base_model"]
        given = {**module, **dict.fromkeys(keys["parameters"].value if "parameters" in keys and isinstance(
            keys["parameters"].value, dict) else ())}
        wanting = [n for n in self.spec.per_input if n not in given and any(n in s.parameters for s in slice_.sources)]
        if self.spec.max_inputs and len(slice_.sources) >= self.spec.max_inputs:
            self.report.error(place, f"{base} would be one more model of {self.method}, as in mergekit; delete base_model")
        elif wanting:
            self.report.error(place, f"{base} is one more model of {self.method}, as in mergekit, and has no "
                                     f"{', '.join(wanting)}; list it under models with one, or delete base_model")
        else:
            self.report.note(place, f"{base} is not listed and takes part as one more model, as in mergekit")
            return replace(slice_, sources=(*slice_.sources, Source(base, None, {})))
        return slice_

    def whole(self, item: Item, entries: list[Item], base: str | None) -> Slice:
        slice_ = Slice(tuple(s for e in entries if (s := self.source(e, ranged=False))), None, {})
        self.check(item, slice_, entries, base)
        return slice_

    def slice(self, entry: Item, base: str | None) -> Slice | None:
        if not self.is_mapping(entry):
            return None
        keys = self.keys(entry, KEYS["slice"])
        if "residual_weight" in keys:
            self.report.note(keys["residual_weight"], "no effect: mergekit has no use for it either")
        entries = self.entries(given(keys, "sources", entry))
        slice_ = Slice(tuple(s for e in entries if (s := self.source(e, ranged=True))), self.model(keys.get("base_model")),
                     self.parameters(keys.get("parameters")))
        self.check(entry, slice_, entries, slice_.base_model or base)
        return slice_

    def source(self, entry: Item, ranged: bool) -> Source | None:
        if not self.is_mapping(entry):
            return None
        if self.theirs:
            keys = self.keys(entry, KEYS["source" if ranged else "model"])
            parameters = self.parameters(keys.get("parameters"), own=True)
        else:
            keys = entry.value
            # ours has no parameters section within an input: what is not the model is a parameter
            inline = {key: value for key, value in keys.items() if key != "model"}
            parameters = self.parameters(Item(inline, entry.line, entry.name), own=True)
        model = self.model(given(keys, "model", entry))
        layers = self.layers(given(keys, "layer_range", entry)) if ranged else None
        return Source(model, layers, parameters) if model and (layers or not ranged) else None

    def check(self, item: Item, slice_: Slice, entries: list[Item], base: str | None) -> None:
        """Whether a slice's sources fit each other and the method."""
        missing = bool(entries and self.spec and self.spec.needs_base and not base)
        if missing:
            self.report.error(item, f"{self.method} needs a base; add {'base_model' if self.theirs else 'base'}: MODEL")
        if len(slice_.sources) < len(entries) or not entries:
            return  # a source that could not be read has its own error, and counts would be wrong without it
        lengths = [(s.model, s.layer_range[1] - s.layer_range[0]) for s in slice_.sources if s.layer_range]
        if len({length for _, length in lengths}) > 1:
            counts = ", ".join(f"{model} {length}" for model, length in lengths)
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
            if self.theirs and name in WITHOUT_EFFECT:
                self.report.note(entry, f"no effect: {WITHOUT_EFFECT[name]}")
            elif self.theirs and name in self.spec.not_mergekit:
                self.report.note(entry, f"no effect: mergekit's {self.method} passes it over; a recipe of ours (method:, "
                                        "inputs:) takes it")
            elif self.theirs and name not in self.spec.parameters and (
                    name in PARAMETERS or not slip(name, frozenset(self.spec.parameters))):
                self.report.note(entry, f"no effect: {self.method} has no such parameter, and mergekit passes it over")
            elif name not in self.spec.parameters:
                allowed = ", ".join(sorted(self.spec.per_input if own else self.spec.parameters)) or "none"
                self.report.error(entry, f"{self.method} has no such parameter{nearest(name, self.spec.parameters)}; "
                                         f"allowed: {allowed}")
            elif own and name not in self.spec.per_input:
                self.report.error(entry, "one value serves the whole merge; give it under the recipe's parameters")
            else:
                value = read_setting(entry, self.spec.parameters[name], self.report, theirs=self.theirs)
                if value is not None:
                    settings[name] = value
        return settings

    def vocabulary(self, keys: Mapping[str, Item], anchor: str | None) -> tuple[str | None, str | None, TokenRules | None]:
        """(vocab, tokenizer_source, rules); of the first two, each derived from the other where only one is given."""
        item, rules = keys.get("tokenizer"), None
        if self.theirs:
            if item is not None and "tokenizer_source" in keys:
                self.report.error(item, "tokenizer and tokenizer_source exclude each other; keep one")
            if item is not None and self.is_mapping(item):
                rules = read_tokens_section(item, self.report, self.keys, self.model)
            elif "tokenizer_source" in keys:
                rules = TokenRules(self.model(keys["tokenizer_source"]) or "base")
            item = keys.get("tokenizer_source", item)
            if rules is None or item is None:
                return None, None, None
            if rules.source.removeprefix("model:") == anchor:
                rules = replace(rules, source="base")
            # a source of its own, rows of single tokens and padding need more than --vocab base and union
            if rules.tokens or rules.pad_to or rules.source not in ("base", "union"):
                return None, rules.source, rules
            item = replace(item, value=rules.source)
        tokenizer = None if item is None else item.value
        if isinstance(tokenizer, str) and tokenizer.removeprefix("model:") == anchor:
            tokenizer = "base"
        if item is not None and tokenizer not in (None, "base", "union"):
            allowed = ", ".join(["base", "union", *([anchor] if anchor else [])])
            self.report.error(item, f"{shown(tokenizer)}: not supported; rows follow the base, without one the first "
                                    f"model; allowed: {allowed}; or make that model the base")
            return None, None, None
        vocab = self.word(keys.get("vocab"), VOCABS) or tokenizer
        if item is not None and vocab and tokenizer and (vocab == "union") != (tokenizer == "union"):
            self.report.error(item, f"tokenizer {tokenizer} does not fit vocab {vocab}: union needs both")
        return vocab, tokenizer or (vocab and ("union" if vocab == "union" else "base")), None
