"""The models of --models: runs, folders of checkpoints or adapters, hub names; each with the place where its results lie.

The commands that answer and score know runs of results/outputs. A model that lies elsewhere gets a link there, under a name
made of its own and, for folders, of its path: two folders of one name have two places.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import manifest
from errors import UserError, nearest
from models.run_folders import ADAPTER, MOE, parts_of, run_files

if TYPE_CHECKING:
    from flags.evaluate_models import EvaluateModelsArgs


@dataclass(frozen=True)
class Model:
    """One model.

    Args:
        label: its row in the table.
        named: as --models has it, without the label.
        run: its name in results/outputs; empty: the base itself.
        base: --model_name_or_path of its commands.
        folder: what results/outputs/RUN is to link to; None for runs and the base, and for a hub name until it is fetched.
        hub: whether ``named`` is a hub name.
    """

    label: str
    named: str
    run: str
    base: str
    folder: Path | None = None
    hub: bool = False

    @property
    def in_report(self) -> str:
        """As inference.py and report.py call it."""
        return self.run or "base"

    @property
    def sub(self) -> str:
        """Its folder of answers and scores."""
        return f"cross_{self.run}" if self.run else "raw"


def read(args: EvaluateModelsArgs, base_given: bool) -> tuple[list[Model], list[str]]:
    """The models, and what is wrong with how they are named. Nothing is fetched.

    Args:
        base_given: whether the command line has --model_name_or_path; else a run's own record of its base counts.
    """
    found, problems = [], []
    for item in args.named_models:
        try:
            found.append(_one(item, args, base_given))
        except UserError as error:
            problems += error.problems
    return _labelled(found, problems), problems


def _one(item: str, args: EvaluateModelsArgs, base_given: bool) -> Model:
    label, _, named = item.partition("=") if "=" in item and not Path(item).expanduser().exists() else ("", "", item)
    label, named = label.strip(), named.strip()
    if not named:
        raise UserError(f"--models {item}: names no model; write MODEL or LABEL=MODEL")
    if named in ("base", "raw", args.model_name_or_path):
        return Model(label or "base", named, "", args.model_name_or_path)
    outputs, path = args.results / "outputs", Path(named).expanduser()
    if "/" not in named and (outputs / named).is_dir():
        return Model(label or named, named, named, _base_of(outputs / named, args, base_given))
    if path.is_dir():
        folder = path.resolve()
        if folder.parent == outputs:
            return Model(label or folder.name, named, folder.name, _base_of(folder, args, base_given))
        place = f"{_safe(folder.name)}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        # a whole model is its own base
        whole = not any((folder / name).is_file() for name in (ADAPTER, MOE))
        return Model(label, named, place, str(folder) if whole else _base_of(folder, args, base_given), folder)
    if "/" not in named and (parts := parts_of(named)):
        return Model(label or named, named, named, _base_of(outputs / parts[0][0], args, base_given))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not named.startswith((".", "~")):
        return Model(label or named, named, _safe(named.replace("/", "--")), named, hub=True)
    listed = sorted(entry.name for entry in outputs.glob("[!.]*")) if outputs.is_dir() else []
    raise UserError(f"--models {item}: neither a run of {outputs} (there: {', '.join(listed) or 'none'}) nor a folder nor a "
                    f"hub name (ORG/NAME){nearest(named, [*listed, 'base'])}")


def _safe(name: str) -> str:
    """A name that every command takes for a run's."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model"


def _labelled(models: list[Model], problems: list[str]) -> list[Model]:
    """Every model with a label of its own; ``problems`` gets what is named twice."""
    names = [model.folder.name if model.folder and not model.label else "" for model in models]
    done: list[Model] = []
    for model, name in zip(models, names, strict=True):
        # of two folders of one name both are called by their places
        label = model.label or (name if names.count(name) == 1 and name not in {m.label for m in models} else model.run)
        done.append(replace(model, label=label))
    for what, key in (("label", lambda m: m.label), ("model", lambda m: (m.run, m.run or m.base))):
        seen: dict[Any, Model] = {}
        for model in done:
            if (first := seen.setdefault(key(model), model)) is not model:
                problems.append(f"--models {model.label}={model.named}: the same {what} as {first.label}={first.named}; "
                                + ("give each a label of its own" if what == "label" else "name it once"))
    return done


def _base_of(folder: Path, args: EvaluateModelsArgs, base_given: bool) -> str:
    """The base of a run or folder: as asked, as its manifests record it, as PEFT does."""
    if base_given:
        return args.model_name_or_path
    at, outputs = folder, args.results / "outputs"
    for _ in range(16):  # fused runs record their parts, and these their base; a circle of manifests ends here
        made = _json(at / manifest.MANIFEST)
        if named := (made.get("config") or {}).get("model_name_or_path"):
            return str(named)
        parents = [Path(parent) for parent in made.get("parents") or [] if isinstance(parent, str)]
        if not parents:
            break
        at = parents[0] if parents[0].is_dir() else outputs / parents[0].name
    named = _json(folder / ADAPTER).get("base_model_name_or_path")
    return named if named and isinstance(named, str) else args.model_name_or_path


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # what is wrong with it is said where it is loaded
    return content if isinstance(content, dict) else {}


def check(model: Model, args: EvaluateModelsArgs, fetch: bool) -> tuple[Model, list[str]]:
    """Look at a model's files without loading it; what is wrong with them comes back too.

    Args:
        fetch: whether a hub model is fetched, and its folder filled in.
    """
    from data.prompts import template
    from models.base.loading import base_path, check_base, load_tokenizer

    flag = f"--models {model.named}"
    if model.hub and not fetch:
        return model, []
    try:
        if model.hub:
            model = replace(model, folder=base_path(model.named, args.cache_dir, flag))
        if model.folder:
            place = args.results / "outputs" / model.run
            if place.exists() and not place.is_symlink():
                raise UserError(f"{flag}: {place} is another run of that name; move it away")
        folder = model.folder or args.results / "outputs" / model.run
        adapter = bool(model.run) and (folder / ADAPTER).is_file()
        fused = bool(model.run) and (folder / MOE).is_file()
        if model.run and not model.folder:
            run_files(args.results, model.run)
        if model.folder and (adapter or fused) and not any(folder.glob("*.safetensors")):
            raise UserError(f"{flag}: {folder} holds no .safetensors file; train or save it again")
        base = base_path(model.base, args.cache_dir, f"{flag}: its base {model.base}" if adapter or fused else flag)
        if adapter:
            check_base(folder, base)
        own = (adapter or fused) and (folder / "tokenizer_config.json").is_file()
        # the template too: a base model without one would answer nothing
        template(args.template, load_tokenizer(folder if own else base, base))
    except UserError as error:
        return model, [problem if flag in problem else f"{flag}: {problem}" for problem in error.problems]
    return model, []


def link_command(model: Model, results: Path) -> str:
    """What ``link`` does, as a command line; empty where there is nothing to link."""
    if not model.folder and not model.hub:
        return ""
    place = str(results / "outputs" / model.run)
    if model.folder:
        return shlex.join(["ln", "-sfn", str(model.folder), place])
    return f'ln -sfn "$(hf download {shlex.quote(model.named)} --quiet)" {shlex.quote(place)}'


def link(model: Model, results: Path) -> None:
    """Let results/outputs/RUN lead to the model's folder."""
    if not model.folder:
        return
    place = results / "outputs" / model.run
    if place.is_symlink() and place.resolve() == model.folder.resolve():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    # a fetched model may have moved to another snapshot: the new link takes the old one's place at once
    temporary = place.with_name(f".{place.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(model.folder, target_is_directory=True)
    os.replace(temporary, place)
