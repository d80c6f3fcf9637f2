"""What a results folder holds, told so that two runs of one command can be compared: bytes, without clocks and places."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import manifest

#: Keys of JSON that say when, how long, how much memory, or how much was left to do after a resume.
_VOLATILE = re.compile(r"second|memory|^time$|finished|command_line|per_s|throughput|runtime|tensors_run|^machine$")


def content(path: Path, out: Path) -> str:
    """A file's hash; of JSON without what depends on the clock, and of texts without the folder's own name."""
    body = path.read_bytes()
    if path.suffix == ".json":
        body = json.dumps(_steady(json.loads(body)), sort_keys=True).encode()
    if path.suffix in (".json", ".jsonl", ".md", ".txt"):
        body = body.replace(str(out).encode(), b"OUT")
    return hashlib.sha256(body).hexdigest()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not _VOLATILE.search(key)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def files(out: Path) -> dict[str, str]:
    """Public files -> their content: no checkpoints, nothing hidden, not the registry."""
    found = {}
    for path in sorted(out.rglob("*")):
        parts = path.relative_to(out).parts
        if path.is_file() and parts[0] != "checkpoints" and not any(part.startswith(".") for part in parts) \
                and path.name != manifest.REGISTRY:
            found["/".join(parts)] = content(path, out)
    return found


def lines(out: Path) -> set[str]:
    """The scores' lines of the registry, without clocks."""
    return {json.dumps(_steady(line), sort_keys=True).replace(str(out), "OUT") for line in manifest.registry(out)
            if line.get("kind") == "score"}


def hidden(out: Path) -> list[str]:
    """What commands leave lying about when they are killed: hidden files and folders."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*") if "checkpoints" not in path.parts)


def half_done(out: Path, calm: dict[str, str]) -> list[str]:
    """Files that claim to be finished and are not those of the undisturbed run.

    A folder with a manifest is finished, and so is a file of scores.
    """
    wrong, now = [], files(out)
    for name in now:
        folder = name.rpartition("/")[0]
        whole = f"{folder}/{manifest.MANIFEST}" in now
        if whole and name in calm and now[name] != calm[name]:
            wrong.append(f"{name}: other bytes")
        elif name.startswith("scores/") and name.endswith(".json") and now[name] != calm.get(name):
            wrong.append(f"{name}: other scores")
    done = {name.rpartition("/")[0] for name in now if name.endswith(f"/{manifest.MANIFEST}")}
    wrong += [f"{name}: missing from a finished folder" for name in calm
              if name.rpartition("/")[0] in done and name not in now]
    return wrong
