"""What a results folder knows of its runs: manifests, registry and folders, checked against the files on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import manifest
from errors import UserError
from flags.mixture import mixture_parts
from models.run_folders import ADAPTER, MOE

#: Scores that a list shows, where there are any.
MAIN = ("safe_refusal", "overrefusal", "balance", "mc2", "factual", "nll")
#: Settings that say where a run's rows came from.
_DATA = ("task_name", "data_path", "data_source", "extra_data", "max_train_samples", "validation_path", "prompt_style_file")
#: What fields of a manifest are, as our commands write them.
_SHAPES: dict[str, Any] = {"config": dict, "inputs": dict, "metrics": dict, "packages": dict, "parents": list,
                           "command_line": list, "command": str, "finished": str, "seed": int, "seconds": int | float}
#: How deep a run's parents are followed.
_DEEPEST = 8


def names(results: Path) -> list[str]:
    """Every run that the folder knows of, the base and scored files of answers among them, in the order of their coming."""
    found = [str(row["run"]) for row in manifest.registry(results, whole=True) if isinstance(row.get("run"), str)]
    outputs = results / "outputs"
    found += sorted(entry.name for entry in outputs.glob("[!.]*") if entry.is_dir()) if outputs.is_dir() else []
    return list(dict.fromkeys(found))


def record(results: Path, run: str) -> dict[str, Any]:
    """A run's line in a list: {"run", "kind", "method", "base", "seed", "date", "scores": {name: value}, "folder"}.

    Raises:
        UserError: nothing is known of such a run.
    """
    folder = results / "outputs" / run
    lines = [row for row in manifest.registry(results, whole=True) if row.get("run") == run]
    if not lines and (not folder.is_dir() or Path(run).name != run):
        raise UserError(f"run '{run}': not in {results}; there: {', '.join(names(results)) or 'none'}")
    made, config = manifest_of(folder), _config(folder)
    scores = _scores(lines)
    return {"run": run, "kind": _kind(folder, run, lines), "method": _method(made, config, lines),
            "base": config.get("model_name_or_path") or _base_of_scores(results, lines),
            "seed": made.get("seed", next((row["seed"] for row in reversed(lines) if "seed" in row), None)),
            "date": made.get("finished") or (lines[-1].get("time", "") if lines else ""),
            "scores": {name: score["value"] for name, (score, _) in scores.items()},
            "folder": str(folder) if folder.is_dir() else ""}


def manifest_of(folder: Path) -> dict[str, Any]:
    """A folder's manifest without the fields that no command of ours would have written so; {} where there is none."""
    return {key: value for key, value in json_object(folder / manifest.MANIFEST).items()
            if isinstance(value, _SHAPES.get(key, object))}


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none or it is damaged: a list must not end at one run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _config(folder: Path) -> dict[str, Any]:
    config = manifest_of(folder).get("config")
    return config if isinstance(config, dict) else {}


def _kind(folder: Path, run: str, lines: list[dict[str, Any]]) -> str:
    if run == "base":
        return "base"
    if _is_mixture(run):
        return "weighted sum"
    if not folder.is_dir():
        trained = any(row.get("kind") == "run" for row in lines)
        return "gone" if trained else "file of answers" if all(row.get("kind") == "score" for row in lines) else "answers"
    kind = next((kind for name, kind in ((MOE, "fused MoE"), (ADAPTER, "adapter"), ("config.json", "full model"))
                 if (folder / name).is_file()), "other")
    return f"{kind} (link)" if folder.is_symlink() else kind


def _is_mixture(run: str) -> bool:
    try:
        return bool(mixture_parts(run))
    except ValueError:  # a name of somebody's own with an @ in it
        return False


def _method(made: dict[str, Any], config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    command = made.get("command") or next((row.get("command", "") for row in lines if row.get("kind") == "run"), "")
    return " ".join(str(part) for part in (command, "moe" if config.get("moe_flag") == 1 else config.get("method")) if part)


def _base_of_scores(results: Path, lines: list[dict[str, Any]]) -> str:
    """The base that a run was scored on, for runs whose own manifest names none."""
    for row in reversed(lines):
        if row.get("kind") == "score":
            path = results / "scores" / row["sub"] / f"{row['command']}.json"
            if named := (json_object(path).get("config") or {}).get("model_name_or_path"):
                return str(named)
    return ""


def _scores(lines: Iterable[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Score name -> (its fields, the registry line that it stands in), the newest of each."""
    return {name: (score, row) for row in lines if row.get("kind") == "score" for name, score in row["scores"].items()}


def detail(results: Path, run: str) -> dict[str, Any]:
    """All that is known of a run, checked against the files; secrets are hidden.

    Raises:
        UserError: nothing is known of such a run.
    """
    found = record(results, run)
    folder = results / "outputs" / run
    lines = [row for row in manifest.registry(results, whole=True) if row.get("run") == run]
    made, config = manifest_of(folder), _config(folder)
    hashes = _weights(folder)
    if folder.is_dir() and not made:
        found["note"] = f"{folder}: no readable {manifest.MANIFEST}; nothing says how it was made"
    return manifest.public({
        **found, "command_line": made.get("command_line"), "settings": config, "seconds": made.get("seconds"),
        "packages": made.get("packages"), "data": {name: config[name] for name in _DATA if config.get(name) is not None},
        "made_from": lineage(results, folder), "weights": hashes,
        "answers": [_answers(path.parent, hashes) for path in sorted(_answer_folders(results, run))],
        "scores": [_score(results, name, score, row) for name, (score, row) in _scores(lines).items()]})


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: manifest.sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def lineage(results: Path, folder: Path, depth: int = 0) -> list[dict[str, Any]]:
    """What a run was made from: each input with the hash that was recorded, whether the files still have it, and its own."""
    made, found = manifest_of(folder), []
    inputs = made.get("inputs") if isinstance(made.get("inputs"), dict) else {}
    parents = {Path(parent).name: parent for parent in made.get("parents") or [] if isinstance(parent, str)}
    for name, want in inputs.items():
        place = _place(results, str(parents.get(name, name)))
        if name == "base":
            place = Path(str(_config(folder).get("model_name_or_path") or "no base named")).expanduser()
        item = {"name": name, "recorded": want, "folder": str(place) if place.is_dir() else "",
                "state": _state(place, str(want))}
        if name != "base" and place.is_dir() and depth < _DEEPEST and place.resolve() != folder.resolve():
            item["made_from"] = lineage(results, place, depth + 1)
        found.append(item)
    return found


def _place(results: Path, parent: str) -> Path:
    """A parent's folder: where it was recorded, or the run of that name here (a results folder may have moved)."""
    recorded, here = Path(parent), results / "outputs" / Path(parent).name
    return recorded if recorded.is_absolute() and not here.is_dir() else here


def _state(folder: Path, want: str) -> str:
    """matches, changed, or why it cannot be told."""
    if not folder.name or not folder.is_dir():
        return "not a folder here, not checked"
    if want.startswith("v2-"):
        from models.checkpoints.fingerprints import fingerprint

        return "matches" if fingerprint(folder) == want else "changed"
    return "matches" if want in _weights(folder).values() else "changed"


def _answer_folders(results: Path, run: str) -> Iterable[Path]:
    sub = "raw" if run == "base" else f"cross_{run}"
    return results.glob(f"inference/*/*/{_literal(sub)}/{manifest.MANIFEST}")


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _answers(folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """A folder of answers, and whether the run's weights are still those that answered."""
    made = manifest_of(folder)
    answered, now = _config(folder).get("model"), ",".join(value[:16] for value in hashes.values())
    state = "not checked" if not now else "matches" if answered == now else "changed: made with other weights"
    return {"task": folder.parent.parent.name, "split": folder.parent.name, "date": made.get("finished"),
            "prompts": (made.get("metrics") or {}).get("prompts"), "weights": state}


def _score(results: Path, name: str, score: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A score, and whether its rows on disk are those that it was computed from."""
    path = results / "scores" / row["sub"] / f"{row['command']}.rows.jsonl"
    if not path.is_file():
        state = "gone"
    elif not row.get("rows_sha256"):
        state = "not recorded"
    else:
        state = "matches" if manifest.sha256(path) == row["rows_sha256"] else "changed"
    fields = ("value", "low", "high", "n", "higher_is_better", "definition")
    return {"score": name, **{key: score.get(key) for key in fields},
            "command": row["command"], "date": row.get("time", ""), "seed": row.get("seed"), "rows": state}


def differing(results: Path, runs: tuple[str, str]) -> dict[str, tuple[Any, Any]]:
    """Setting -> its value in both runs, for those that differ; where they were written does not count."""
    folders = [results / "outputs" / run for run in runs]
    flat = [_flat({**_config(folder), "inputs": manifest_of(folder).get("inputs") or {}}) for folder in folders]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if key.partition(".")[0] not in {*manifest.PLACE, "run_name"}]
    return {key: (manifest.public(flat[0].get(key), key), manifest.public(flat[1].get(key), key))
            for key in keys if flat[0].get(key) != flat[1].get(key)}


def _flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found
