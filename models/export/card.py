"""README.md of an exported model: what it is made of, how to run it, what it scored where it was scored, its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import manifest
from models.export.sources import Source

#: Scores that a card shows, in the order of the report's table: the score's name -> what the column is called.
_SHOWN = {"refusal": "refusal", "overrefusal": "over-refusal", "balance": "refusal - over-refusal", "mc2": "MC2",
          "nll": "held-out NLL"}
#: The embedded model where it comes from.
_EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_card(folder: Path, source: Source, base: str, title: str, facts: Sequence[str], limits: Sequence[str],
               results: Path | None) -> None:
    """Write the card.

    Args:
        base: as the flags name it.
        facts: how this layout of the run came to be, a sentence each.
        limits: what a reader must know before using it, a sentence each.
        results: where the registry with the scores lies; None: what is written is not what was scored.
    """
    base = _public(base)
    lines = ["---", "library_name: transformers", f"base_model: {json.dumps(base)}", "tags:", "- merge",
             *(["- moe", "- mixture-of-experts"] if source.moe else []), "---", "", f"# {title}", "", *facts, "",
             "## What it is made of", "", *_made_of(source, base), ""]
    lines += ["## Scores", "", *_scores(source, results), "", "## Limits", "", *(f"- {limit}" for limit in limits), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _public(name: str) -> str:
    """A base's name as others know it: a path of one machine names nothing to anybody else."""
    if name == "embedded":
        return _EMBEDDED
    return name if name.count("/") <= 1 and not name.startswith((".", "~", "/")) else Path(name).name


def _made_of(source: Source, base: str) -> list[str]:
    lines = [f"- base: {base}, fingerprint `{source.hashes['base']}`"]
    if source.moe:
        moe = source.moe
        for expert in moe.experts:
            digest = moe.sources.get(expert, "")
            lines.append(f"- expert `{expert}`: the base's FFN and a low-rank change"
                         + (f", SHA-256 of its adapter `{digest}`" if digest else ""))
        lines.append(f"- router: softmax over {len(moe.experts)} experts per token and layer, the top {moe.top_k}, divided "
                     "by their sum")
        lines += [f"- tuned after fusing: LoRA of rank {part.r} (alpha {part.alpha:g}) on {where}"
                  for where, part in (("every expert", moe.tuning), ("attention", moe.attention)) if part]
    for name in (key for key in source.hashes if key not in ("base", "moe", "moe_config") and "(" not in key):
        weight = source.weights.get(name)
        lines.append(f"- adapter `{name}`" + (f" times {weight:g}" if weight is not None else "")
                     + f", SHA-256 `{source.hashes[name]}`")
    for folder in source.folders:
        lines += [f"- `{folder.name}`: {said}" for said in [_trained(folder)] if said]
    return lines


def _trained(folder: Path) -> str:
    """How a run was trained, by its manifest; empty without one."""
    if not (folder / manifest.MANIFEST).is_file():
        return ""
    found = manifest.read(folder)
    config = found.get("config") or {}
    shown = {key: config[key] for key in ("method", "task_name", "data_source", "learning_rate", "num_train_epochs",
                                          "gate_loss_weight", "template", "seed") if config.get(key) is not None}
    return f"{found.get('command', 'made')} ({', '.join(f'{k} {v}' for k, v in shown.items())})" if shown else ""


def _scores(source: Source, results: Path | None) -> list[str]:
    """The last scores of the run in the registry, each with its interval."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in manifest.registry(results) if results else ():
        if row.get("kind") == "score" and row.get("run") == source.name:
            found |= {name: score for name, score in (row.get("scores") or {}).items() if isinstance(score, dict)}
    shown = {name: found[name] for name in _SHOWN if name in found}
    if not shown:
        return ["None: this model was not scored where it was written." if results else
                "None: a part of a run is another model than the run, and was not scored by itself."]
    lines = ["Of the run before its export, in the type that it was scored in; 95 % intervals.", "",
             "| score | value | interval | n | what it is |", "|---|---|---|---|---|"]
    for name, score in shown.items():
        low, high = score.get("low"), score.get("high")
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        cells = (f"{_SHOWN[name]} {'↑' if score.get('higher_is_better') else '↓'}", f"{score['value']:.3f}", interval,
                 str(score.get("n", "")), str(score.get("definition", "")).replace("|", "/"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
