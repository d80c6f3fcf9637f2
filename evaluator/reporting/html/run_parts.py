"""What every row was made by: for each run and seed its manifest's essentials and the commands that remake its numbers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import manifest
from config import ROOT
from errors import UserError
from evaluator.reporting.html.elements import Html, section, tag
from evaluator.reporting.run_records import manifest_of, record
from evaluator.reporting.table import seed_names

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.reporting.page import Content

#: Where the commands lie that are called by their bare names.
_FOLDERS = ("", "models", "evaluator", "data", "scripts")
_DEEPEST = 8


def parts_of(content: Content) -> list[list[dict[str, Any]]]:
    """For each row, for each of its runs and seeds: what it is, what it cost, and its commands.

    A part: {name, run, folder, kind, method, seed, finished, seconds, total_seconds, peak_memory_mb, packages, inputs, make,
    answers, scores}. ``make``: commands in their order, those of the runs that it was made from before it; ``answers`` and
    ``scores``: task or command -> command line. What a manifest does not say is left out.
    """
    return [_parts(line, content.roots) for line in content.lines]


def _parts(line: Line, roots: Sequence[Path]) -> list[dict[str, Any]]:
    places = [(run, root) for run in line.run.split("+") for root in roots]
    found = []
    for (run, root), name, item in zip(places, seed_names(line), line.found, strict=True):
        known = _record(root, run)
        chain = _chain(root, run)
        own = chain[-1] if chain and chain[-1]["run"] == run else {}
        seconds = [step["seconds"] for step in chain if "seconds" in step]
        facts = {
            "name": name, "run": run, "folder": _shown(item.folder), "kind": known.get("kind"),
            "method": known.get("method"), "seed": item.seed, "finished": own.get("finished"), "seconds": own.get("seconds"),
            "total_seconds": sum(seconds) if seconds else None, "peak_memory_mb": own.get("peak_memory_mb"),
            "parameters": own.get("metrics", {}).get("trainable_parameters"), "packages": own.get("packages"),
            "inputs": own.get("inputs"), "make": [step["command"] for step in chain if "command" in step],
            "answers": dict(_answers(root, run)), "scores": dict(_scores(root, item.origin.values()))}
        found.append(manifest.public({key: value for key, value in facts.items() if value not in (None, "", {}, [])}))
    return found


def _record(root: Path, run: str) -> dict[str, Any]:
    try:
        return record(root, "base" if run == "raw" else run)
    except UserError:
        # a row that nobody has scored yet
        return {}


def _chain(root: Path, run: str, seen: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """A run's manifest behind those of the runs that it was made from, each once: what must be done in its order."""
    content = manifest_of(root / "outputs" / run)
    if not content or run in seen or len(seen) > _DEEPEST:
        return []
    steps: dict[str, dict[str, Any]] = {}
    for parent in content.get("parents", ()):
        for step in _chain(root, Path(str(parent)).name, seen | {run}):
            steps.setdefault(step["run"], step)
    line = content.get("command_line")
    return [*steps.values(), {**content, "run": run, **({"command": _command(line)} if line else {})}]


def _command(words: Sequence[Any]) -> str:
    """A command line as it is typed in the repository's root; secrets are hidden."""
    name, *rest = map(str, manifest.public(list(words)))
    folder = next((folder for folder in _FOLDERS if (ROOT / folder / name).is_file()), "")
    return shlex.join(["python", f"{folder}/{name}" if folder else name, *rest])


def _answers(root: Path, run: str) -> Iterable[tuple[str, str]]:
    sub = "raw" if run in ("base", "raw") else f"cross_{run}"
    for path in sorted(root.glob(f"inference/*/*/*/{manifest.MANIFEST}")):
        line = manifest_of(path.parent).get("command_line") if path.parent.name == sub else None
        if line:
            yield path.parent.parent.parent.name, _command(line)


def _scores(root: Path, lines: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Every command that scored, as the settings in its score file give it."""
    for line in lines:
        path = root / "scores" / str(line["sub"]) / f"{line['command']}.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
        if not isinstance(settings, dict):
            continue
        flags = {**({} if settings.get("answers") else {"task_name": line["sub"]}), **settings, "output_dir": _shown(root)}
        words = [word for name, value in flags.items() if value not in (None, "", False)
                 for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
        yield line["command"], _command([f"{line['command'].partition('.')[0]}.py", *words])


def _shown(folder: Path) -> str:
    # a page is read elsewhere too: a path of this machine helps nobody there
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else folder.name


def runs_section(lines: Sequence[Line], parts: Sequence[Sequence[Mapping[str, Any]]]) -> Html:
    """A fold for each row: its runs, what their manifests say, and the commands that remake them."""
    return section("runs", "Runs and commands", *(
        tag("details", tag("summary", line.label, " ", tag("small", kinds(of))), *map(_part, of), id=f"run-{number}")
        for number, (line, of) in enumerate(zip(lines, parts, strict=True))),
        says="What each row was made from, and the commands that make it again, in their order, typed in the repository.")


def kinds(parts: Sequence[Mapping[str, Any]]) -> str:
    """What the runs of a row are, e.g. "adapter"."""
    return ", ".join(dict.fromkeys(part["kind"] for part in parts if part.get("kind"))) or "unknown"


def _part(part: Mapping[str, Any]) -> Html:
    facts = [("run", part["run"]), ("folder", part["folder"]), ("made by", part.get("method")),
             ("finished", part.get("finished")), ("took", _seconds(part)), ("peak memory", _memory(part)),
             ("trained parameters", f"{part['parameters']:,}" if isinstance(part.get("parameters"), int) else None),
             ("packages", ", ".join(f"{name} {version}" for name, version in part.get("packages", {}).items())),
             ("inputs", ", ".join(f"{name} {str(value)[:16]}" for name, value in part.get("inputs", {}).items()))]
    commands = [*part.get("make", ()), *part.get("answers", {}).values(), *part.get("scores", {}).values()]
    return tag("div", tag("h3", part["name"]),
               tag("dl", *((tag("dt", name), tag("dd", value)) for name, value in facts if value)),
               tag("pre", tag("code", "\n".join(dict.fromkeys(commands))), tabindex=0,
                   aria_label=f"commands of {part['run']}, {part['name']}") if commands else
               tag("p", "No manifest says how it was made.", class_="says"), class_="part")


def _seconds(part: Mapping[str, Any]) -> str:
    if not isinstance(part.get("seconds"), int | float):
        return ""
    total = part.get("total_seconds")
    more = f"; {total:,.0f} s with what it was made from" if total and round(total) != round(part["seconds"]) else ""
    return f"{part['seconds']:,.0f} s{more}"


def _memory(part: Mapping[str, Any]) -> str:
    value = part.get("peak_memory_mb")
    return f"{value:,.0f} MB" if isinstance(value, int | float) else ""
