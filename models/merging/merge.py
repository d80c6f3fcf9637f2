"""Merge full checkpoints: recipe -> plan -> run folder. The command behind ``models/fuse.py merge``."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import manifest
from errors import UserError, nearest
from flags.merge import MergeArgs
from models.checkpoints.fingerprints import fingerprint
from models.checkpoints.kinds import other_kind
from models.checkpoints.reader import INDEX, Checkpoint
from models.checkpoints.writer import Layout, Writer, plan_layout
from models.merging.budget import Budget, budget
from models.merging.methods import METHODS, Method
from models.merging.plan import MergePlan, Policies, anchor, match, models
from models.merging.recipes import Recipe, Slice, Source, read_recipe
from models.merging.tokens import vocabulary
from models.merging.tokens.chat_templates import chosen_template, write_template
from models.operators.declared import assignments, scalar

log = logging.getLogger(__name__)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PLAN = "plan.json"
#: What mergekit takes where its recipe is silent and we would ask, or take another value.
_MERGEKIT = {"density": 1.0, "max_iter": 10, "tol": 1e-5}
#: Files of the base that a merged model needs beside its weights: how it answers, how words and images are read.
COMPANIONS = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
              "merges.txt", "*.model", "chat_template*", "processor_config.json", "preprocessor_config.json",
              "video_preprocessor_config.json")


def merge(args: MergeArgs) -> str:
    """Plan the merge; with ``--dry_run`` return the plan, else carry it out and write ``results/outputs/RUN``."""
    if args.parameters.strip() == "help":
        return _help()
    specs = {name: row.spec() for name, row in METHODS.items()}
    recipe = read_recipe(Path(args.recipe).expanduser(), specs) if args.recipe else recipe_of_flags(args)
    method = METHODS[recipe.method]
    target = args.results / "outputs" / args.run_name
    # the text and not the path: an edited recipe is another merge
    settings = asdict(args) | {"recipe_text": recipe.text}
    if not (args.overwrite or args.dry_run) and manifest.finished(target, settings):
        return f"{target}: already merged"
    folders = _folders(recipe, args)
    # writing starts by clearing the target
    if target.resolve() in [folder.resolve() for folder in folders.values()]:
        raise UserError(f"--run_name {args.run_name}: {target} is an input of this merge; choose another name")
    with ExitStack() as stack:
        checkpoints = with_adapters(recipe, folders, stack, _opened)
        policies = Policies(args.vocab or recipe.vocab or "", args.tied_heads,
                            DTYPES.get(args.out_dtype or recipe.out_dtype or recipe.dtype or "", ""))
        template = chosen_template(recipe, {name: checkpoints[name].folder for name in models(recipe)})
        # from here on only headers are read, until the plan is known to fit
        plan = match(recipe, method, checkpoints, policies, _MERGEKIT if recipe.mergekit else {},
                     _tokenizer_folder(recipe, folders, args))
        layout = plan_layout([(job.name, job.dtype, job.shape) for job in plan.jobs], int(args.shard_gb * 1e9))
        cost = budget(plan, method, args.memory_gb, args.threads, target.parent)
        description = describe(recipe, plan, layout, cost)
        if args.dry_run:
            return description
        log.info(description)
        _run(args, settings, recipe, method, checkpoints, plan, layout, cost, target, template)
    return f"{target}: {recipe.method}, {len(plan.jobs)} tensors"


def recipe_of_flags(args: MergeArgs) -> Recipe:
    """The recipe that the flags spell out.

    Raises:
        UserError: unknown method or parameter, values of the wrong type, range or number; all at once.
    """
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: not known{nearest(args.method, METHODS)}; allowed: {', '.join(METHODS)}")
    row, names, problems = METHODS[args.method], args.model_names, []
    if row.base == "yes" and not args.base_model:
        problems.append(f"--base_model: {args.method} works on task vectors; name what the models were fine-tuned from")
    if row.base == "no" and args.base_model:
        problems.append(f"--base_model: {args.method} takes none; list the model under --models if it takes part")
    low, high = row.inputs
    # as in a recipe: a base among the models is the base
    beside = [name for name in names if row.base == "no" or name != args.base_model]
    if not low <= len(beside) <= high:
        problems.append(f"--models {args.models}: {args.method} takes {low if low == high else f'{low} to {high}'}"
                        + ("" if len(beside) == len(names) else f" beside the base; here: {len(beside)}"))
    adapters, wrong = _adapted([*([args.base_model] if args.base_model else []), *names])
    problems += wrong
    values = _parameters(args.parameters, row, len(names), problems)
    # after other problems it would only repeat them: a misspelt name is missing too
    missing = row.missing(values)
    if missing and not problems:
        problems.append(f"--parameters {args.parameters}: {args.method} needs {', '.join(missing)}, e.g. "
                        f"--parameters \"{missing[0]}=0.5\"")
    if problems:
        raise UserError(*problems)
    # flags make the same recipe as a file would, so that everything behind them exists once
    own = {k: v for k, v in values.items() if isinstance(v, tuple)}
    sources = tuple(Source(name, None, {k: v[i] for k, v in own.items()}) for i, name in enumerate(names))
    return Recipe(args.method, args.base_model or None, (Slice(sources, None, {}),), True,
                  {k: v for k, v in values.items() if k not in own}, None, None, None, None, "", Path(),
                  adapters=adapters)


def _adapted(names: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """name -> (model, adapter) of those written MODEL+ADAPTER, as in mergekit's recipes; and what is wrong with others."""
    found: dict[str, tuple[str, str]] = {}
    problems = []
    for name in names:
        # a folder may have a plus in its name
        if "+" not in name or Path(name).expanduser().exists():
            continue
        model, _, adapter = name.partition("+")
        if not model or not adapter or "+" in adapter:
            problems.append(f"--models {name}: needs MODEL+ADAPTER, one adapter at most")
        else:
            found[name] = (model, adapter)
    return found, problems


def _parameters(text: str, row: Method, count: int, problems: list[str]) -> dict[str, Any]:
    """Name -> value, or a tuple of one per model, from the flag's text; what is wrong with it goes to ``problems``."""
    settings: dict[str, Any] = {}
    for written, name, given in assignments(text):
        if name not in row.fields():
            meant = nearest(name or written, row.fields())
            problems.append(f"--parameters {written}: not a parameter of this method{meant}; "
                            f"allowed: {', '.join(row.fields()) or 'none'}")
            continue
        values = tuple(scalar(word.strip()) for word in given.split(","))
        each = row.fields()[name].metadata["each"]
        if len(values) > 1 and (not each or len(values) != count):
            problems.append(f"--parameters {written}: takes one value{f', or {count}, one for each model' if each else ''}")
            continue
        try:
            accepted = tuple(row.checked(name, value) for value in values)
            settings[name] = accepted if len(accepted) > 1 else accepted[0]
        except ValueError as error:
            problems.append(f"--parameters {written}: {error}")
    return settings


def _help() -> str:
    lines = []
    for name, row in METHODS.items():
        low, high = row.inputs
        lines.append(f"{name}: {row.source}; base: {row.base}; models: {low if low == high else f'{low} to {high}'}")
        for key, item in row.fields().items():
            default = "must be given" if item.default is None else f"default {item.default}"
            each = ", one per model" if item.metadata["each"] else ""
            lines.append(f"    {key}: {item.metadata['help']} ({default}{_range(row, key)}{each})")
    return "\n".join(lines)


def _range(row: Method, name: str) -> str:
    """The values that a parameter takes, as the help tells them; empty: any number."""
    kind, low, high = row.rule(name)
    if choices := row.fields()[name].metadata["choices"]:
        return f", one of {', '.join(choices)}"
    if kind is not float or (low is None and high is None):
        return ", true or false" if kind is bool else ""
    bounds = (f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}")
    return f", {bounds}"


def _folders(recipe: Recipe, args: MergeArgs) -> dict[str, Path]:
    """The folder of every input: a finished run, a local folder, the embedded model, or a hub name's snapshot."""
    folders, problems = {}, []
    # of MODEL+ADAPTER both parts are folders of their own
    names = [part for name in models(recipe) for part in recipe.adapters.get(name, (name,))]
    for name in dict.fromkeys(names):
        run = args.results / "outputs" / name
        try:
            folders[name] = run if "/" not in name and run.is_dir() else _local(name, args)
        except UserError as error:
            # the loader speaks of the flag that most commands have
            said = str(recipe.path) if recipe.text else "--base_model" if name == recipe.base_model else "--models"
            problems += [problem.replace("--model_name_or_path", f"{said}:" if recipe.text else said)
                         for problem in error.problems]
    # two spellings of one folder would be a model beside itself, or a base that counts as tuned
    places: dict[Path, str] = {}
    for name, folder in folders.items():
        other = places.setdefault(folder.resolve(), name)
        if other != name:
            problems.append(f"{recipe.path if recipe.text else '--models'}: {other} and {name} are one folder, "
                            f"{folder.resolve()}; write it in one way")
    if problems:
        raise UserError(*problems)
    return folders


def _tokenizer_folder(recipe: Recipe, folders: Mapping[str, Path], args: MergeArgs) -> Path | None:
    """Where the tokenizer lies that a recipe names as a source; None for the anchor's own."""
    if recipe.tokens is None:
        return None
    if args.vocab:
        raise UserError(f"--vocab {args.vocab}: the recipe's tokenizer section matches the tokens; drop one of the two")
    name = recipe.tokens.source
    if name in ("base", "union"):
        return None
    run = args.results / "outputs" / name
    return folders.get(name) or (run if "/" not in name and run.is_dir() else _local(name, args))


def _local(name: str, args: MergeArgs) -> Path:
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    from models.base.folders import TENSORS  # loads torch: only for the embedded model and the hub
    from models.base.loading import base_path

    return base_path(name, args.cache_dir, use=TENSORS)


def with_adapters(recipe: Recipe, folders: Mapping[str, Path], stack: ExitStack, opened: Callable) -> dict[str, Checkpoint]:
    """Every input, open, by the name that the recipe uses; of MODEL+ADAPTER a view of the model with the adapter on it."""
    bases = {recipe.adapters.get(name, (name,))[0]: None for name in models(recipe)}
    checkpoints = opened({name: folders[name] for name in bases}, stack)
    problems: list[str] = []
    for name, (base, adapter) in recipe.adapters.items():
        from models.adapters.adapted import AdaptedCheckpoint  # with torch, which a plan without adapters does not need

        try:
            checkpoints[name] = AdaptedCheckpoint.over(checkpoints[base], folders[adapter], name, stack)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return {name: checkpoints[name] for name in models(recipe)}


def _opened(folders: Mapping[str, Path], stack: ExitStack) -> dict[str, Checkpoint]:
    checkpoints, problems = {}, []
    for name, folder in folders.items():
        if kind := other_kind(folder):
            problems.append(kind)
            continue
        try:
            checkpoints[name] = stack.enter_context(Checkpoint.open(folder)).plain()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return checkpoints


def describe(recipe: Recipe, plan: MergePlan, layout: Layout, cost: Budget) -> str:
    """The plan as text: what is matched, moved and kept in memory."""
    inputs = len({id(p.checkpoint) for job in plan.jobs for p in job.pieces})
    weights = sum(prod(job.shape) for job in plan.jobs)
    lines = [
        f"{recipe.method} of {inputs} models: {len(plan.jobs)} tensors matched, {weights / 1e6:,.1f} M weights",
        f"read    {cost.bytes_read / 1e9:.2f} GB ({plan.bytes_in / 1e9:.2f} GB of inputs, "
        f"{round(cost.bytes_read / max(plan.bytes_in, 1))} x at most)",
        f"write   {layout.total / 1e9:.2f} GB in {len(layout.headers)} file(s)",
        f"memory  {cost.peak_bytes / 2**30:.2f} GB at most, beyond the interpreter ({cost.workers} workers)",
        f"time    {cost.seconds:.1f} s at least, at the {cost.read_per_second / 1e9:.1f} GB/s read and "
        f"{cost.write_per_second / 1e9:.1f} GB/s written just now",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _run(args: MergeArgs, settings: dict[str, Any], recipe: Recipe, method: Method, checkpoints: Mapping[str, Checkpoint],
         plan: MergePlan, layout: Layout, cost: Budget, target: Path, template: str) -> None:
    import torch

    from models.merging.execute import JOURNAL, execute

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    with ThreadPoolExecutor(cost.workers) as pool:  # reading and hashing both leave the interpreter's lock
        hashes = pool.map(fingerprint, [checkpoint.folder for checkpoint in checkpoints.values()])
        inputs = dict(zip(checkpoints, hashes, strict=True))
    # an adapter is an input of its own: another one under the same name is another merge
    for name, adapter in ((n, c.adapter) for n, c in checkpoints.items() if hasattr(c, "adapter")):
        # its configuration holds the scale, which no fingerprint of weights sees
        inputs |= {f"{name} (adapter)": fingerprint(adapter),
                   f"{name} (adapter's configuration)": manifest.sha256(adapter / "adapter_config.json")}
    settled = {"config": {k: v for k, v in settings.items() if k not in manifest.PLACE}, "inputs": inputs}
    with manifest.writing(target, "merge", settings, overwrite=args.overwrite, resume=True) as run:
        # a resumed merge may trust finished tensors only if every input still has the bytes it had
        resume = manifest.same_plan(run.folder / PLAN, settled)
        if not resume:
            for file in run.folder.iterdir():
                file.unlink()
            manifest.write_json(run.folder / PLAN, settled)
        writer = Writer(run.folder, layout, resume)
        try:
            tensors_run = execute(plan.jobs, method, writer, run.folder, workers=cost.workers, seed=args.seed, device=device)
            writer.finish()
        finally:
            writer.close()
        _companions(checkpoints[anchor(recipe)], plan, run.folder)
        if template:
            write_template(run.folder, template)
        # the manifest holds all of it; what is left of a run's folder is a model
        for name in (PLAN, JOURNAL):
            (run.folder / name).unlink()
        run.parents.extend(str(checkpoint.folder) for checkpoint in checkpoints.values())
        run.parents.extend(str(c.adapter) for c in checkpoints.values() if hasattr(c, "adapter"))
        run.inputs.update(inputs)
        run.metrics.update(method=recipe.method, tensors=len(plan.jobs), tensors_run=tensors_run, bytes_read=cost.bytes_read,
                           bytes_written=layout.total, workers=cost.workers, promised_gb=args.memory_gb)
    manifest.register(args.results, {"kind": "run", "command": "merge", "run": args.run_name, "seed": args.seed,
                                     **run.metrics})


def _companions(first: Checkpoint, plan: MergePlan, folder: Path) -> None:
    """The anchor's configuration, adapted to what changed, and its tokenizer."""
    if plan.config:
        manifest.write_json(folder / "config.json", plan.config)
    tokenizer = getattr(plan.rows, "folder", None) or first.folder
    files = {file.name: file for pattern in COMPANIONS for file in tokenizer.glob(pattern)}
    # how the base answers stays the base's, whose tokens ever the result has
    if tokenizer != first.folder:
        files |= {"generation_config.json": first.folder / "generation_config.json"}
    for file in files.values():
        if file.is_file() and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    if plan.rows:
        vocabulary.write_new_tokens(folder, plan.rows)
