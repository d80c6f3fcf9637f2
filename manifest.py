"""Run folders and the registry: what went in, what came out, and whether it finished.

A run's folder appears under its final name only when it is complete: it is written as ``.NAME.partial`` beside it and
renamed. ``manifest.json`` inside holds the resolved arguments, the command line, hashes of the inputs, parent runs,
package versions, seed, seconds, peak memory and status. ``registry.jsonl`` gets one line per finished run or score.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import locks
from errors import UserError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
REGISTRY = "registry.jsonl"
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "scipy")
#: Settings that decide where, not what: a run is the same run whatever they are.
PLACE = {"output_dir", "cache_dir", "overwrite", "threads", "memory_gb", "dry_run", "device_map"}


#: What stands for a secret.
HIDDEN = "[hidden]"
#: Settings whose value is a secret; max_new_tokens and judge_key_variable are none.
_SECRET_NAME = re.compile(r"(^|_)(token|key|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE)
#: Values that are secrets wherever they stand: keys of Hugging Face, OpenAI, GitHub, AWS, Google, wandb; passwords of URLs.
_SECRET = re.compile(r"\bhf_\w{8,}|\bsk-[\w-]{8,}|\bgh[pousr]_\w{10,}|\bgithub_pat_\w{10,}|\bAKIA[0-9A-Z]{12,}"
                     r"|\bAIza[\w-]{20,}|\bwandb_v\d_\w{10,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


@dataclass
class Run:
    """A run being written: fill ``parents``, ``inputs`` and ``metrics``; files go into ``folder``."""

    folder: Path
    command: str
    config: dict[str, Any]
    parents: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def writing(target: Path, command: str, config: dict[str, Any], *, overwrite: bool = False, resume: bool = False,
            absent: Mapping[str, Any] | None = None, meant: Mapping[str, Any] | None = None) -> Iterator[Run]:
    """Write a run folder that appears under ``target`` only when the block ends without an error.

    With ``resume`` the block finds what a killed run left behind (hidden, as ``.NAME.partial``) and what it leaves behind
    itself when it is interrupted; the block must check that it fits. A UserError clears it away.

    One command at a time writes a run: another one waits here.

    Raises:
        UserError: ``target`` holds a run with another configuration and ``overwrite`` is off, or another command finished
            it while this one waited.
    """
    with contextlib.ExitStack() as stack:
        if is_main():
            try:
                waited = stack.enter_context(locks.alone(target))
            except OSError as error:
                raise _unwritable(target, error) from None
            if waited and not overwrite and finished(target, config, absent, meant, wait=False):
                raise UserError(f"{target}: another command finished this run while this one waited for it; nothing is "
                                "lost, and the same command again takes it as it is")
        yield from _written(target, command, config, overwrite, resume, absent, meant)


def _written(target: Path, command: str, config: dict[str, Any], overwrite: bool, resume: bool,
             absent: Mapping[str, Any] | None, meant: Mapping[str, Any] | None) -> Iterator[Run]:
    # beside the target, so that the rename stays within one file system; a name of its own for every rank
    staging = target.with_name(f".{target.name}.partial" + ("" if is_main() else f".{os.environ['RANK']}"))
    _settle(target)
    # raises here, before any work, where another configuration holds the name
    if not overwrite:
        finished(target, config, absent, meant, wait=False)
    if not resume:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from None
    run = Run(staging, command, config)
    # a clock that is set while a run is under way must not make its seconds wrong
    start = time.monotonic()
    try:
        yield run
        # last of all files: a folder with a manifest is whole
        write_json(staging / MANIFEST, _manifest(run, start))
        if not is_main():
            shutil.rmtree(staging)
            return
        swap(staging, target)
    # Ctrl-C too: half a run is no run, unless it may be resumed
    except BaseException as error:
        if not resume or isinstance(error, UserError):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir: {target.parent} cannot hold a run ({error.strerror or error}); give a folder that can "
                     "be written to")


def swap(new: Path, target: Path) -> None:
    """Give a folder its final name, where another may hold it: the old one goes aside first and is deleted last.

    A kill at any moment leaves one of them whole, under the name or hidden as ``.NAME.replaced`` (``_settle``).
    """
    aside = _aside(target)
    # a rename cannot replace a folder that holds files
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.replace(aside)
    try:
        new.replace(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.replace(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _settle(target: Path) -> None:
    """Finish what a kill within the ``swap`` of a run left undone."""
    aside, staging = _aside(target), target.with_name(f".{target.name}.partial")
    if not (is_main() and aside.exists()):
        return
    if not target.exists():
        # with a manifest the new one is whole
        (staging if (staging / MANIFEST).is_file() else aside).replace(target)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def is_main() -> bool:
    """Whether this process writes results: the only one, or rank 0 of a torchrun / accelerate launch."""
    # set by torchrun and accelerate; a process on its own has none
    return os.environ.get("RANK", "0") == "0"


def finished(target: Path, config: dict[str, Any], absent: Mapping[str, Any] | None = None,
             meant: Mapping[str, Any] | None = None, wait: bool = True) -> bool:
    """Whether ``target`` already holds this run, finished; of a run that another process writes it is told when that ends.

    Args:
        absent: settings that a configuration leaves out where they have these values.
        meant: values that an earlier version wrote down where this one writes what they stood for; they count as ours.
        wait: whether a run that another process writes is waited for.

    Raises:
        UserError: it holds a run of the same name with another configuration: names every setting that differs.
    """
    # of several ranks the first writes, under a lock that the others must not wait for
    if wait and is_main():
        locks.wait_for(target)
    _settle(target)
    if not (target / MANIFEST).is_file():
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target}: exists but holds no {MANIFEST}; move it away{_or_rename(config)}")
        return False
    old = read(target).get("config")
    if old is None:
        raise UserError(f"{target}: holds a checkpoint, not a finished run; move it away{_or_rename(config)}")
    told = {k: config.get(k) if (meant or {}).get(k, object()) == v else v for k, v in old.items()}
    differ = differing({**(absent or {}), **told}, {**(absent or {}), **config})
    if differ:
        listed = "; ".join(f"{k}: {old.get(k)} there, {config.get(k)} here" for k in differ)
        raise UserError(f"{target}: holds a run with another configuration ({listed}); "
                        f"{'use another --run_name, or ' if 'run_name' in config else 'use '}--overwrite to replace it"
                        + ("" if "run_name" in config else ", or another --output_dir"))
    return True


def _or_rename(config: Mapping[str, Any]) -> str:
    # the name of some commands' folders follows from other flags: they have no --run_name to change
    return " or choose another --run_name" if "run_name" in config else ", or choose another --output_dir"


def same_settings(path: Path, config: dict[str, Any]) -> bool:
    """Whether the JSON file ``path`` records this configuration (places and thread counts do not matter)."""
    return path.is_file() and not differing(json.loads(path.read_text(encoding="utf-8")), config)


def same_plan(path: Path, plan: dict[str, Any]) -> bool:
    """Whether the JSON file ``path`` holds exactly this plan."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        return False


def remove(folder: Path) -> None:
    """Delete a folder of ours, e.g. an outdated checkpoint."""
    shutil.rmtree(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run; a UserError when there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished run here ({MANIFEST} is missing)") from None
    except ValueError:
        raise UserError(f"{path}: damaged; run the command that made it again with --overwrite") from None


def register(results: Path, row: dict[str, Any]) -> None:
    """Append one line to ``results/registry.jsonl``; safe with several processes, of which only the main one writes."""
    if not is_main():
        return
    results.mkdir(parents=True, exist_ok=True)
    # one write of one line: a kill cuts the last line at most
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **row}, ensure_ascii=False) + "\n"
    with (results / REGISTRY).open("ab+") as file:
        # two lanes may finish at once: the look at the last byte and the write behind it must be one step
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        # behind a line that a kill cut off, a new one begins
        file.write((b"\n" if file.read(1) not in (b"", b"\n") else b"") + line.encode())


def registry(results: Path, whole: bool = False) -> list[dict[str, Any]]:
    """Every line of the registry, oldest first; an empty list when there is none yet.

    A line that a kill cut off, or that is no line of ours, is left out with a warning.

    Args:
        whole: leave out scores without run, command or numbers too. Reports do not: an older score would take their place.
    """
    path = results / REGISTRY
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            fault = _fault(entry, whole)
        except (ValueError, RecursionError):
            fault = "cut off"
        if fault:
            log.warning("%s, line %d: %s, left out; run the command that wrote it again", path, number, fault)
        else:
            entries.append(entry)
    return entries


def _fault(entry: Any, whole: bool) -> str:
    """What a line of the registry lacks that its readers take for granted; empty: nothing."""
    if not isinstance(entry, dict):
        return "no JSON object"
    if entry.get("kind") != "score" or not whole:
        return ""
    scores = entry.get("scores")
    full = isinstance(scores, dict) and all(isinstance(score, dict) and {"value", "low", "high", "n"} <= score.keys()
                                            for score in scores.values())
    named = all(isinstance(entry.get(name), str) for name in ("run", "sub", "command"))
    return "" if full and named else "a score without its run, command or numbers"


def public(value: Any, name: str = "") -> Any:
    """A setting as it may be shown: tokens, keys and passwords are hidden, by their flag's name or by what they look like.

    Args:
        value: a setting, or a mapping or list of them; in a command line the word behind such a flag is hidden too.
        name: of the setting.
    """
    if isinstance(value, Mapping):
        return {key: public(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        flags = [item.removeprefix("--") if isinstance(item, str) and item.startswith("--") else "" for item in value]
        return [public(item, flag or name) for item, flag in zip(value, ["", *flags], strict=False)]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_NAME.search(name.replace("-", "_")):
        return HIDDEN
    flag, sign, rest = value.partition("=")
    if sign and flag.startswith("--") and rest and _SECRET_NAME.search(flag.removeprefix("--").replace("-", "_")):
        return f"{flag}={HIDDEN}"
    return _SECRET.sub(HIDDEN, value)


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file and a rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside it, hidden: a rename replaces a file at once, within one file system
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def sha256(path: Path) -> str:
    """The hash of a file, or of every file of a folder with their names."""
    import hashlib  # OpenSSL, which no --help waits for

    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            # names count too; the zero byte keeps name and content apart
            digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings of ``new`` that ``old`` has otherwise; places and thread counts do not matter."""
    # what only the old run recorded decides nothing: an older version wrote down flags that its command did not read
    # through JSON as the old ones went: tuples become lists, paths would raise here
    new = json.loads(json.dumps(new))
    return [k for k in sorted(new.keys() - PLACE) if old.get(k) != new[k]]


def _manifest(run: Run, start: float) -> dict[str, Any]:
    return {
        "status": "done",
        "command": run.command,
        "command_line": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": run.config,
        "parents": run.parents,
        "inputs": run.inputs,
        "metrics": run.metrics,
        "seed": run.config.get("seed"),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str:
    import importlib.metadata  # and with it the parser of mails, which no --help waits for

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
