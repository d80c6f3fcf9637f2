"""How scores and the answers behind them were computed: dtype and batches, as part of what identifies them and as a record.

Which rows share a pass changes the shapes of the products, and so the order in which their terms are added: in bfloat16 that
moves the third digit of a likelihood, in float32 the last ones (docs/evaluation.md, Comparing two runs).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import manifest

if TYPE_CHECKING:
    from flags import EvaluateArgs

log = logging.getLogger(__name__)
#: Flags that decide which rows share a pass of a model that is scored.
_BATCHES = ("batch_tokens", "harness_batch_size")


def settings(args: EvaluateArgs) -> dict[str, Any]:
    """What a model's own scores depend on beside their flags: the dtype that ``auto`` stands for here, and the batches."""
    from models.base.placement import resolved_dtype

    return {"dtype": resolved_dtype(args), **{name: getattr(args, name) for name in _BATCHES if hasattr(args, name)}}


def as_meant(recorded: Any, wanted: Mapping[str, Any], asked: str, path: Path) -> Any:
    """Settings of an earlier version as this one writes them down.

    Batches that were not recorded count as the wanted ones. ``auto`` counts as the wanted dtype where this call says auto
    too, for then nobody asked for a dtype; to a call that names one it is another.
    """
    if not isinstance(recorded, dict):
        return recorded
    meant = {**{name: wanted[name] for name in _BATCHES if name in wanted}, **recorded}
    if recorded.get("dtype") == "auto" == asked != wanted.get("dtype"):
        log.info("%s: says --dtype auto and not what that was; taken for %s, as this call says auto too", path,
                 wanted["dtype"])
        meant["dtype"] = wanted["dtype"]
    return meant


def same(path: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], dtype: str = "") -> bool:
    """Whether a score file was made with these settings and inputs, and the rows beside it are its own."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        # a kill between both files leaves the rows of another call; older score files have no hash to tell by
        own = "rows_sha256" not in old or old["rows_sha256"] == manifest.sha256(path.with_suffix(".rows.jsonl"))
    except (FileNotFoundError, ValueError):
        return False
    # calls that failed are made again: such a file is no end
    failed = any(judge["notes"].get("failed") for judge in old.get("judged", {}).values())
    meant = as_meant(old.get("config"), settings, dtype, path)
    return own and meant == settings and old.get("inputs") == inputs and not failed


def another_base(path: Path, args: EvaluateArgs, inputs: Mapping[str, str]) -> str:
    """Why the base's own scores may not be written: those there are of another base. Empty where they may.

    A run's folder is its own model, trained anew or not; ``raw`` is whichever base ``--model_name_or_path`` names.
    """
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["inputs"]["model"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    if args.overwrite or there == inputs.get("model", there):
        return ""
    return (f"{path}: scores of another base than --model_name_or_path {args.model_name_or_path}; a results folder is for "
            "one base, so give another --output_dir, or --overwrite to replace them")


def made_with(args: EvaluateArgs, sub: str, sets: Iterable[str], model: Mapping[str, Any]) -> dict[str, Any]:
    """What a report must know to say how two runs were computed.

    Args:
        sub: the subject's folder.
        sets: of the rows; those with a folder of answers are looked up there.
        model: ``settings`` where a model was scored, else empty.

    Returns:
        {"answers": {set: {"dtype", "batch_size", "backend"}}, "model": {"dtype", "batch_tokens", ...}}; what is not known is
        not in it, batches that decide nothing are "any", and a back end that is not named is hf.
    """
    answers = {}
    for name in dict.fromkeys(sets):
        task = getattr(args, "answers_task", name) if name == "alpaca_eval" else name.removesuffix("_answers")
        folder = args.results / "inference" / task / args.dataset_type / sub
        if not getattr(args, "answers", None) and (folder / manifest.MANIFEST).is_file():
            answers[name] = _of(manifest.read(folder).get("config") or {})
    return {**({"answers": answers} if answers else {}), **({"model": dict(model)} if model else {})}


def _of(config: Mapping[str, Any]) -> dict[str, Any]:
    # answers of the back end hf do not say so (inference.py)
    found = {key: config[key] for key in ("dtype", "batch_size", "backend") if config.get(key) not in (None, "auto")}
    # in float32 a greedy answer does not depend on its neighbours (inference.py)
    if found.get("dtype") == "float32" and not config.get("do_sample"):
        found["batch_size"] = "any"
    return found
