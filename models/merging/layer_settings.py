"""What a configuration says about single layers, carried along when slices pick, repeat or drop layers.

Three ways to say it, and what becomes of each when layer j of the result is layer ``origin[j]`` of a model:

    a value per layer      layer_types: [sliding, full, ..]        the values of the origins
    numbers of layers      mlp_only_layers: [0, 3]                 the places at which those layers stand now
    a rule of the number   sliding_window_pattern: 6,              kept where every layer still has its kind; a threshold
                           first_k_dense_replace: 1                is moved; else the list takes over, or it is refused
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errors import UserError
from models.checkpoints.configs import depth_key, filled

#: (model, layer of it) for every layer of the result.
Origins = Sequence[tuple[str, int]]
#: Lists as long as a model may be deep that are about something else.
_NO_LAYERS = re.compile(r"architectures|token|label|^m?rope|factor|section|keys|shape|langs|auto_map|^attention_types$")
_NUMBERS = re.compile(r"(^|_)(layers|layer_ids|blocks|layer_idx|layer_indices|attn_idxs?|layer_indexes)$")
#: Layers from this number on are of another kind.
_THRESHOLDS = ("first_k_dense_replace", "max_window_layers")
#: Every so many layers one is of another kind: shift of the number, or the key of the offset.
_PERIODS: dict[str, int | str] = {
    "sliding_window_pattern": 1, "_sliding_window_pattern": 1, "full_attention_interval": 1, "decoder_sparse_step": 1,
    "no_rope_layer_interval": 1, "interleave_moe_layer_step": 1, "global_attn_every_n_layers": 0, "moe_layer_freq": 0,
    "attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
#: Rule -> the list that goes before it where the model has one.
_LISTED = {"max_window_layers": "layer_types", "sliding_window_pattern": "layer_types",
           "_sliding_window_pattern": "layer_types", "full_attention_interval": "layer_types",
           "global_attn_every_n_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers",
           "interleave_moe_layer_step": "moe_layers", "first_k_dense_replace": "mlp_layer_types"}
#: Settings that count layers in a way not known here.
_UNKNOWN = re.compile(r"pattern|period|interval|every_n|layer_freq|layer_step|layer_start|layer_end|first_k|last_k|"
                      r"shared_layers|inverse_layer_idx|_offset$")


def sliced(parts: Mapping[str, Mapping[str, Any]], first: str, origins: Origins) -> dict[str, Any]:
    """The anchor's section with the layers of the result.

    Args:
        parts: model -> the section of its configuration that describes its layers.
        first: the anchor, whose settings hold for everything else.

    Raises:
        UserError: a setting counts layers in a way that the new order breaks and no list can say.
    """
    part = dict(parts[first])
    # of no configuration, or of no layers, there is nothing to carry along
    if not part:
        return part
    known = {model: filled(parts[model]) for model in dict.fromkeys(model for model, _ in origins)}
    own = filled(part)
    key, depth = depth_key(part), _depth(part, own)
    if [layer for model, layer in origins] == list(range(depth or -1)) and {model for model, _ in origins} == {first}:
        return part
    part[key] = len(origins)
    wanted = _lists(parts, known, first, origins, depth)
    for name, values in wanted.items():
        if name in part:
            part[name] = values
    if "attention_types" in part and "attention_layers" in wanted:
        # GPT-Neo's way: [[kinds, how often], ..]
        part["attention_types"] = [[list(wanted["attention_layers"]), 1]]
    # a rule may be the class's default, too
    rules = {**(own.to_dict() if own is not None else {}), **parts[first]}
    problems = [*_renumber(part, parts[first], origins, depth), *_rules(part, rules, wanted, origins)]
    if problems:
        raise UserError(*problems)
    return _explicit(part, wanted)


def mixed(parts: Mapping[str, Mapping[str, Any]], sources: Sequence[tuple[str, int]]) -> str | None:
    """Where layers that become one are of different kinds in their own models, as words for a note; None: nowhere."""
    values = []
    for model, layer in sources:
        lists = {k: v for k, v in parts[model].items() if _is_list(k, v, _depth(parts[model], None))}
        values.append({k: v[layer] for k, v in lists.items() if layer < len(v)})
    for key in values[0]:
        kinds = [own.get(key) for own in values]
        if None not in kinds and len({str(kind) for kind in kinds}) > 1:
            return key + " " + ", ".join(f"{kind} in layer {layer} of {model}"
                                         for kind, (model, layer) in zip(kinds, sources, strict=True))
    return None


def _depth(part: Mapping[str, Any], known: Any) -> int | None:
    return part.get(depth_key(part), getattr(known, "num_hidden_layers", None))


def _is_list(key: str, value: Any, depth: int | None) -> bool:
    return (isinstance(value, list | tuple) and len(value) == depth and not _NO_LAYERS.search(key)
            and not (_NUMBERS.search(key) and _numbers(key, value, depth)))


def _numbers(key: str, value: Any, depth: int | None) -> bool:
    """Whether a list holds numbers of layers: rising, each below the depth. [0, 1] of two layers may be either."""
    return (isinstance(value, list) and all(type(n) is int for n in value) and list(value) == sorted(set(value))
            and all(0 <= n < (depth or 0) for n in value) and key != "no_rope_layers")


def _lists(parts: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any], first: str, origins: Origins,
           depth: int | None) -> dict[str, list]:
    """Per-layer list -> its values at the origins: from the configurations, or as their classes fill them in."""
    full = {model: {**(known[model].to_dict() if known[model] is not None else {}), **parts[model]} for model in known}
    # a list that is null in the file is the class's
    for model, own in full.items():
        if known[model] is not None:
            own.update({k: v for k, v in known[model].to_dict().items() if own.get(k) is None})
    main = first if first in full else next(iter(full))
    found = {}
    for key, value in full[main].items():
        if not _is_list(key, value, depth):
            continue
        lists = {model: values for model, own in full.items() if isinstance(values := own.get(key), list | tuple)}
        short = [model for model, layer in origins if model not in lists or layer >= len(lists[model])]
        if short:
            raise UserError(f"config.json of {short[0]}: {key} has no value for every layer that the slices take; save the "
                            "model again with transformers, which fills it in")
        found[key] = [lists[model][layer] for model, layer in origins]
    return found


def _renumber(part: dict[str, Any], old: Mapping[str, Any], origins: Origins, depth: int | None) -> list[str]:
    """Lists of layer numbers, in place; what cannot be renumbered."""
    problems = []
    for key, value in old.items():
        if not _NUMBERS.search(key) or not isinstance(value, list) or not value or _is_list(key, value, depth):
            continue
        if _numbers(key, value, depth):
            part[key] = [j for j, (_, layer) in enumerate(origins) if layer in value]
        else:
            problems.append(f"slices: config.json has {key} {value}, which is neither a value per layer nor numbers of "
                            "layers; merge whole models (models: without layer_range)")
    return problems


def _rules(part: dict[str, Any], old: Mapping[str, Any], wanted: Mapping[str, list],
           origins: Origins) -> list[str]:
    """Settings that count layers: kept, moved or, where a list says it, left out, in place; what none of these solves."""
    problems = []
    # layers from the first on, in order: counting from the front gives each what it had
    in_order = [layer for _, layer in origins] == list(range(len(origins)))
    for key, value in old.items():
        kind = _kind(old, key)
        if kind is None:
            counts = _UNKNOWN.search(key) and key not in _PERIODS.values()
            odd = counts and bool(value) and not isinstance(value, list | dict | str)
            # what counts from the last layer is wrong even for the first ones
            if odd and not (in_order and "shared_layers" not in key):
                problems.append(f"slices: config.json has {key} {value}, which counts layers; picked layers would count "
                                "otherwise; merge whole models (models: without layer_range), or layers from 0 on")
            continue
        kinds = [kind(layer) for _, layer in origins]
        # without windows, from which layer on there would be some is of no account
        idle = key == "max_window_layers" and not old.get("use_sliding_window")
        if idle or kinds == [kind(j) for j in range(len(origins))]:
            continue
        moved = kinds.index(True) if True in kinds else len(kinds)
        if key in _THRESHOLDS and all(kinds[moved:]):
            part[key] = moved
        elif _LISTED.get(key) in wanted or (_LISTED.get(key) in part and isinstance(part[_LISTED[key]], list)):
            part.pop(key, None)
        else:
            problems.append(f"slices: config.json has {key} {value}, by which the picked layers would change their kind "
                            f"(wanted: {_runs(kinds)}); choose layer ranges that keep it, or merge whole models (models: "
                            "without layer_range)")
    return problems


def _kind(part: Mapping[str, Any], key: str) -> Callable[[int], bool] | None:
    """The rule that a setting makes of a layer's number; None for any other setting."""
    value = part[key]
    if type(value) is not int or key not in (*_THRESHOLDS, *_PERIODS):
        return None
    if key in _THRESHOLDS:
        return lambda layer: layer >= value
    shift = _PERIODS[key]
    offset = part.get(shift, 0) if isinstance(shift, str) else -shift
    # 0 and 1: all layers are of one kind
    return (lambda layer: (layer - offset) % value == 0) if value > 1 else (lambda layer: True)


def _runs(kinds: Sequence[bool]) -> str:
    return "".join("x" if kind else "." for kind in kinds)


def _explicit(part: dict[str, Any], wanted: Mapping[str, list]) -> dict[str, Any]:
    """The section with every list written that its class would fill in otherwise, proven by filling it in."""
    known = filled(part)
    if known is None:
        return part
    for key, values in wanted.items():
        # lists that the class makes by itself out of what is written need not stand there
        if list(getattr(known, key, values)) != values:
            part[key] = values
    made = filled(part)
    wrong = [key for key, values in wanted.items() if list(getattr(made, key, None) or values) != values]
    if wrong:
        raise UserError(f"slices: transformers' class of {part['model_type']} makes its own {wrong[0]} whatever is written; "
                        "choose layer ranges that keep it, or merge whole models (models: without layer_range)")
    return part
