"""Configurations compared by what they mean, and one written for the result: a value that is absent is its class's default.

An old config.json lacks what a newer one spells out, and the two describe one architecture. Where a value stands on one side
only, transformers' own configuration class says what it is (no code of the checkpoint runs); it is loaded only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

from errors import UserError
from models.checkpoints.header import shown

if TYPE_CHECKING:
    from models.checkpoints.reader import Checkpoint

SHAPE_KEYS = ("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads")
QUIET_KEYS = ("rope_theta", "rms_norm_eps", "rope_scaling", "max_position_embeddings", "sliding_window", "hidden_act",
              "head_dim", "layer_types", "final_logit_softcapping", "logits_scaling", "embedding_multiplier")
DTYPE_KEYS = ("dtype", "torch_dtype")
Config = TypeVar("Config", bound=Mapping[str, Any])
#: What of a configuration says nothing about what its weights compute, or is settled elsewhere.
_ASIDE = frozenset({
    *SHAPE_KEYS, *QUIET_KEYS, *DTYPE_KEYS, "rope_parameters", "vocab_size", "tie_word_embeddings", "use_cache", "auto_map",
    "transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation", "pretraining_tp",
    "gradient_checkpointing", "initializer_range", "unsloth_version", "unsloth_fixed", "output_router_logits", "id2label",
    "label2id", "task_specific_params", "finetuning_task"})
#: Where the model that reads words stands in a configuration of several.
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
#: How many layers a decoder has, by family.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def section(config: Config) -> Config:
    """The part of a configuration that describes the layers of words: text_config of a vision-language model, else all."""
    inner = next((config[key] for key in _TEXT if isinstance(config.get(key), dict) and config[key]), None)
    return config if inner is None else section(inner)


def depth_key(part: Mapping[str, Any]) -> str:
    return next((key for key in _DEPTHS if key in part), _DEPTHS[0])


def filled(part: Mapping[str, Any]) -> Any | None:
    """A section as an object of transformers' configuration class, with every default; None for a type it does not know.

    Raises:
        UserError: transformers knows the type and refuses the values.
    """
    from transformers import CONFIG_MAPPING  # loads torch: only where a value is absent, or layers are picked

    if part.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[part["model_type"]].from_dict(deepcopy(dict(part)))
    except Exception as error:  # validators of a hundred classes, each with exceptions of its own
        text = " ".join(str(error).split())
        raise UserError(f"config.json of a {part['model_type']}: transformers refuses it ({shown(text)}); repair the value, "
                        "or take the model's own file") from None


def filled_known(part: Mapping[str, Any]) -> Any:
    """``filled`` of a type that is known to be transformers' own; a ValueError where it is not."""
    found = filled(part)
    if found is None:
        raise ValueError(f"{part.get('model_type')}: no model type of transformers")
    return found


def ties_head(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties the head to the embedding; None where nothing tells."""
    part = section(config)
    for given in (config, part):
        if isinstance(given.get("tie_word_embeddings"), bool):
            return given["tie_word_embeddings"]
    whole = filled(config) if config else None
    return getattr(whole, "tie_word_embeddings", None)


def compare(checkpoints: Mapping[str, Checkpoint], order: Sequence[str], problems: list[str], notes: list[str]) -> None:
    """What the configurations differ in: architectures are problems, values that no tensor shows are notes."""
    first = section(checkpoints[order[0]].config)
    for name in order[1:]:
        other = section(checkpoints[name].config)
        if not first or not other:
            continue
        differ = _differing(SHAPE_KEYS, first, other)
        # of one type, classes differ in their heads, which the tensors tell more exactly
        if "architectures" in differ and first.get("model_type") == other.get("model_type") is not None:
            notes.append(f"{order[0]} and {name} were saved from other classes ({_told('architectures', differ)})")
            del differ["architectures"]
        # depth alone may differ: slices pick layers
        if differ and list(differ) != ["num_hidden_layers"]:
            told = "; ".join(_told(key, differ) for key in differ)
            problems.append(f"{order[0]} and {name} are different architectures ({told}); "
                            "merge models fine-tuned from the same checkpoint")
        quiet = _differing(QUIET_KEYS, first, other)
        # of the others, what both files say: a token that ends answers, a multiplier, a window
        mine, its = ({**checkpoints[n].config, **part} for n, part in ((order[0], first), (name, other)))
        quiet |= {key: (mine[key], its[key]) for key in sorted((mine.keys() & its.keys()) - _ASIDE)
                  if mine[key] != its[key] and not isinstance(mine[key], dict)
                  and not key.endswith(("dropout", "_drop", "pdrop"))}
        if quiet:
            told = "; ".join(_told(key, quiet) for key in quiet)
            notes.append(f"{order[0]} and {name} differ in {told}: the result keeps {order[0]}'s")


def _told(key: str, values: Mapping[str, tuple[Any, Any]]) -> str:
    # a list by layer fills a screen
    return f"{key} " + " and ".join(str(value) if len(str(value)) < 80 else shown(value) for value in values[key])


def _differing(keys: Sequence[str], first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, where they differ in meaning."""
    found = {key: pair for key in keys if (pair := (_given(first, key), _given(other, key)))[0] != pair[1]}
    # an absent value is a default, not a difference
    if any(None in pair for pair in found.values()):
        known = filled(first), filled(other)
        for key, pair in list(found.items()):
            if None not in pair:
                continue
            if key in ("model_type", "architectures"):
                del found[key]
            elif None not in known:
                meant = tuple(_meant(part, key) for part in known)
                found[key] = meant
                if meant[0] == meant[1]:
                    del found[key]
            # shapes that nothing states are left to the tensors; they show each of them
            elif key in SHAPE_KEYS:
                del found[key]
    return found


def _given(part: Mapping[str, Any], key: str) -> Any:
    rope = part.get("rope_parameters")
    if key in ("rope_theta", "rope_scaling") and key not in part and isinstance(rope, dict):
        # where transformers 5 keeps it; a type of "default" is no scaling
        if key == "rope_theta":
            return rope.get("rope_theta")
        kept = {k: v for k, v in rope.items() if k != "rope_theta"}
        return None if kept.get("rope_type", "default") == "default" else kept
    return part.get(key)


def _meant(known: Any, key: str) -> Any:
    rope = getattr(known, "rope_parameters", None)
    if key in ("rope_theta", "rope_scaling") and isinstance(rope, dict):
        return _given({"rope_parameters": rope}, key)
    return getattr(known, key, None)


def written(config: Mapping[str, Any], part: Mapping[str, Any], dtype: str | None, vocab: int | None,
            head: bool) -> dict[str, Any]:
    """The anchor's configuration with the result's layers, type, vocabulary and head; nothing else changes.

    Args:
        part: the section of words as the result has it.
        dtype: of all weights; None: of several types, of which the configuration keeps what it said.
        head: whether a head of its own is written.
    """
    made = _with_section(config, dict(part))
    for given in _sections(made):
        # the first is the whole; those inside it get a type only where they said one
        if dtype and (given is made or any(key in given for key in DTYPE_KEYS)):
            for key in DTYPE_KEYS:
                given.pop(key, None)
            given["dtype"] = dtype
    words = section(made)
    if vocab is not None:
        words["vocab_size"] = vocab
        if "vocab_size" in made:
            made["vocab_size"] = vocab
    # what was written decides: transformers would tie over a head that is there
    if head:
        for given in (made, words):
            if given.get("tie_word_embeddings") is not None:
                given["tie_word_embeddings"] = False
        # absent, many classes would tie
        made.setdefault("tie_word_embeddings", False)
    return made


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration and those of the models inside it; new dictionaries in place of the old."""
    found = [config]
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            config[key] = dict(value)
            found += _sections(config[key])
    return found


def _with_section(config: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    key = next((key for key in _TEXT if isinstance(config.get(key), dict) and config[key]), None)
    return part if key is None else {**config, key: _with_section(config[key], part)}
