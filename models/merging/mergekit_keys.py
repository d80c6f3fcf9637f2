"""What a recipe of mergekit 0.1.5 may say, and which of it we refuse. docs/reference/mergekit.md is its twin.

mergekit passes over every key that it does not know. So do we, with a remark, where that cannot be a slip: a key that is
nearly a known one, or a parameter that stands outside ``parameters``, would be half a recipe lost without a word.
"""

from __future__ import annotations

import difflib

from models.merging.recipe_values import Item, Report

#: Keys by level: the top, an entry of slices, of their sources, of models, of modules; a model written as a mapping and its
#: parts; the tokenizer section, a token of it and that token's source.
KEYS: dict[str, tuple[str, ...]] = {
    "top": ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
            "tokenizer_source", "tokenizer", "chat_template"),
    "slice": ("sources", "base_model", "parameters", "residual_weight"),
    "source": ("model", "layer_range", "parameters"),
    "model": ("model", "parameters"),
    "module": ("slices", "models", "parameters"),
    "reference": ("model", "lora", "override_architecture"),
    "path": ("path", "revision"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "token": ("source", "force"),
    "token_source": ("kind", "model", "token_id", "token"),
}
#: Ours beside them, at the top: where on a gradient the final norm and the head lie.
EXTENSIONS = ("head_at",)
#: Parameters of any of its methods.
PARAMETERS = frozenset({"weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "scale",
                        "filter_wise", "select_topk", "max_iter", "tol", "normalize_weights", "eps", "nuslerp_row_wise",
                        "nuslerp_flatten", "r", "alpha"})
#: Its methods; all of them are rows of METHODS.
METHOD_NAMES = ("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear",
                "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce", "nearswap", "arcee_fusion",
                "ram", "ramplus_tl", "passthrough")
#: Keys that it does not read and that one may expect to act: what to do instead.
REFUSED = {
    "random_seed": "give it with --seed",
    "seed": "give it with --seed",
    "revision": "mergekit passes it over here; name the folder of that revision",
    "lora": "mergekit passes it over here; write model: MODEL+ADAPTER",
    "tokens": "it belongs under tokenizer",
    "pad_to_multiple_of": "it belongs under tokenizer",
    "filter": "it belongs to a parameter's value",
}
#: Parameters that change how mergekit computes, not what.
WITHOUT_EFFECT = {
    "int8_mask": "masks are exact here whatever their type",
    "random_seed": "mergekit reads no seed in a recipe; give it with --seed",
    "seed": "mergekit reads no seed in a recipe; give it with --seed",
}
#: Keys that tell recipes of its other programs -> which one, and what there is instead.
OTHER_TOOLS = {"experts": "mergekit-moe (here: experts are adapters, fused by models/llama_moe.py)",
               "genome": "mergekit-evolve (here: give the merge that was found)"}
_SLIP = 0.78


def slip(word: str, known: tuple[str, ...] | frozenset[str]) -> str:
    """`` (did you mean X?)`` when a word is nearly a known one, or nothing."""
    match = difflib.get_close_matches(word, sorted(known), n=1, cutoff=_SLIP)
    return f" (did you mean {match[0]}?)" if match else ""


def unknown_key(report: Report, entry: Item, key: str, allowed: tuple[str, ...]) -> None:
    """What is said about a key that mergekit does not know at this level: an error, a remark, or nothing (an anchor)."""
    if entry.anchored:
        return
    hint = slip(key, allowed)
    if key in REFUSED:
        report.error(entry, f"not supported; {REFUSED[key]}; allowed keys: {', '.join(allowed)}")
    elif key in PARAMETERS:
        report.error(entry, "stands outside parameters, where mergekit passes it over; move it under parameters")
    elif hint or any(key in keys for keys in KEYS.values()):
        report.error(entry, f"unknown key{hint}; allowed keys: {', '.join(allowed)}")
    else:
        report.note(entry, "no key of mergekit's, which passes it over; so does this merge")
