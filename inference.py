"""Answer a test set with one or several trained runs.

    python inference.py --task_name safety --cross_task mix_moe_reg_00000_00000_00000_gate_00100 --dataset_type test
    python inference.py --task_name catqa --attack cot --cross_task safety
    python inference.py --task_name safety --adapters task=0.6,safety=0.4 --prompt_style orbit

Writes results/inference/TASK[+ATTACK]/SPLIT/cross_RUN/outputs_final.csv (prompts, outputs) and outputs_final.jsonl. Batched,
seeded, resumable by batch; the same decoding for every model. Fused models also get their router's shares as .npy and
heat-map in results/observation. Under torchrun or accelerate launch every process answers its share of the batches.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import console
import manifest
import runtime
from data.escaped import ANSWER_COLUMNS, csv_cell
from data.records import Record, stable_hash
from errors import UserError, exit_on_user_error, fits
from flags import InferenceArgs
from flags.base import PROTOCOLS
from flags.inference import ANSWERED
from flags.memory import smaller
from models.footprint.planned import planned

if TYPE_CHECKING:
    from data.prompt_styles import Style
    from data.sets.attacks import Attack
    from models.generation.backends import Answerer, Backend
    from models.generation.kept import KeptAnswers
    from models.runs import Loaded

log = logging.getLogger(__name__)
#: Flags that choose among runs, and where they lie; the rest identifies one run's answers.
_SELECT = ("cross_task", "adapters", "aligned_flag", "device_map")
#: Flags that came later than the first answers: left out of the settings where they change nothing.
_NEUTRAL = {"attack": "none", "prompt_style": "none", "unique_prompts": False, "backend": "hf"}
#: About how many answers' routing is looked at, spread over the set; each costs a further forward pass.
_OBSERVED = 96


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(InferenceArgs, argv)
        args: InferenceArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        if problems := _problems(args):
            raise UserError(*problems)
        from models.base import processes

        # first of all: a process that is not the first shall not say what transformers says at its start
        processes.join()
        from models.generation.backends import backend_of
        from models.runs import keeping_base

        backend = backend_of(args)
        if problems := backend.problems(args.runs):
            raise UserError(*problems)
        # base and adapters in one command: the base is loaded once
        with fits(smaller(args)), keeping_base():
            folders = [answer_run(run, args, backend) for run in args.runs]
        console.finish(folders, _scored_by(args, console.same(parsed, "model_name_or_path", "output_dir", "cache_dir",
                                                              "template", "dataset_type")))


def _scored_by(args: InferenceArgs, same: Sequence[str]) -> list[str]:
    """The command line that scores these answers, with ``same`` at its end; empty where none reads this set."""
    from data.sets.protocols import task_of

    command, flag = {"safety": ("safety", "harmful_task"), "overrefusal": ("safety", "overrefusal_task"),
                     "helpfulness": ("helpfulness", "answers_task"),
                     "truthfulness": ("truth_and_info", "answers_task")}.get(task_of(args.answers_name), ("", ""))
    if not command:
        return []
    subs = ",".join(sub_folder(run) for run in args.runs)
    usual = args.answers_name in ANSWERED
    checkpoint = ["--checkpoint_number", str(args.checkpoint_number)] if args.checkpoint_number >= 0 else []
    return [f"evaluator/evaluate_{command}.py", "--task_name", subs, *([] if usual else [f"--{flag}", args.answers_name]),
            *checkpoint, *same]


def answer_run(run: str, args: InferenceArgs, backend: Backend) -> Path:
    """Answer the prompts with one run ("" is the base) and return the folder of its answers."""
    from data.prompt_styles import style
    from data.sets.attacks import attack
    from models.base import processes
    from models.generation.kept import keeping, remove_left

    folder = answers_root(args) / sub_folder(run, args.checkpoint_number)
    wrapper, form = attack(args.attack, args.attack_file), style(args.prompt_style, args.prompt_style_file)
    # before prompts and model are loaded: a finished run is told in a second
    settings, done = processes.agreed(lambda: _asked(run, args, wrapper, form, folder))
    if done:
        # a kill may have come before this: with --overwrite they would be taken for the answers of that call
        if processes.rank() == 0:
            remove_left(folder)
        return folder
    # prompts before the model: what is wrong with them shows at once
    records, reduction = prompts_of(args)
    with keeping(folder) as kept:
        # who waited for another command may find the answers done
        if processes.agreed(lambda: kept.waited and _asked(run, args, wrapper, form, folder)[1]):
            return folder
        answerer = backend.open(run)
        # one process writes; the others only answer
        with _writing(folder, settings, args) if processes.rank() == 0 else nullcontext() as out:
            rows = answer_all(answerer, records, args, kept, settings, wrapper, form)
            if out:
                _finish(out, rows, answerer.loaded, args, run, reduction)
        # only now: the answers are safe under their final name
        kept.remove()
    if out:
        manifest.register(args.results, {"kind": "answers", "command": "inference", "run": run or "base",
                                         "task": args.answers_name, "split": args.dataset_type, "seed": args.seed,
                                         **out.metrics})
        log.info("%s: %d answers, %d of them cut at %d tokens", folder, len(rows), out.metrics["at_limit"],
                 args.max_new_tokens)
    processes.wait()
    return folder


def _asked(run: str, args: InferenceArgs, wrapper: Attack, form: Style, folder: Path) -> tuple[dict[str, Any], bool]:
    """The settings of the answers, and whether they lie there already; waits for a command that is writing them."""
    settings = _settings(args, wrapper, form) | {"run": run, "model": _model_hash(run, args, folder)}
    if args.overwrite or not manifest.finished(folder, settings, _absent(args), _meant(args)):
        return settings, False
    log.info("%s: already answered", folder)
    if (was := manifest.read(folder)["config"].get("dtype")) != settings["dtype"]:
        log.info("%s: says --dtype %s and not what that was; taken for %s, as this call says auto too", folder, was,
                 settings["dtype"])
    return settings, True


def _writing(folder: Path, settings: dict[str, Any], args: InferenceArgs) -> AbstractContextManager[manifest.Run]:
    return manifest.writing(folder, "inference", settings, overwrite=args.overwrite, absent=_absent(args),
                            meant=_meant(args))


def _finish(out: manifest.Run, rows: Sequence[dict], loaded: Loaded, args: InferenceArgs, run: str,
            reduction: dict[str, Any]) -> None:
    """Write the answers and what the manifest says of them."""
    from models.moe.files import moe_layers

    write_rows(out.folder, rows)
    stopped = sum(row["finish"] == "stop" for row in rows)
    out.metrics.update(prompts=len(rows), stopped=stopped, at_limit=len(rows) - stopped)
    if reduction:
        out.metrics["protocol"] = reduction
    out.parents.append(run or "base")
    if moe_layers(loaded.model):
        observe(loaded, rows, args, run)


def answers_root(args: InferenceArgs) -> Path:
    """The folder that holds a folder of answers for each run."""
    return args.results / "inference" / args.answers_name / args.dataset_type


def sub_folder(run: str, checkpoint: int = -1) -> str:
    """The published folder name of a run's answers: raw, cross_RUN, with _N for a checkpoint."""
    return (f"cross_{run}" if run else "raw") + (f"_{checkpoint}" if checkpoint >= 0 and run else "")


def prompts_of(args: InferenceArgs) -> tuple[list[Record], dict[str, Any]]:
    """The prompts to answer, in their fixed order, and for a protocol what became of its rows."""
    if args.task_name in PROTOCOLS:
        from data.sets import protocols

        records, reduction = protocols.load(args.task_name, args.data_path, args.data_source, args.unique_prompts)
        return _drawn(records, args.num_samples), reduction.as_dict()
    from data.sources import load_records

    source = {args.task_name: args.data_path} if args.data_path else args.data_source
    records = load_records(args.task_name, args.dataset_type, source=source, split_mode=args.split_mode,
                           unique_prompts=args.unique_prompts)
    return _drawn(records, args.num_samples), {}


def _drawn(records: list[Record], n: int) -> list[Record]:
    if not 0 <= n < len(records):
        return records
    # files are sorted by category: the first n rows would be one category, a hash draws from all of them
    # no seed: every model answers the same prompts, and n + 1 of them hold the n
    drawn = sorted(range(len(records)), key=lambda i: stable_hash(records[i].prompt))[:n]
    return [records[i] for i in sorted(drawn)]


def answer_all(answerer: Answerer, records: Sequence[Record], args: InferenceArgs, kept: KeptAnswers, settings: dict,
               wrapper: Attack, form: Style) -> list[dict]:
    """Answer every record, unit by unit (a batch, or several), keeping finished units for a resume.

    Of several processes each takes one unit after the other: units are the same and as large as with one process, so their
    padding and their seed are too. All processes return all rows.

    A row keeps the prompt as it was written; ``rendered`` is what the model read. An answer that was begun for the model
    counts from its beginning, which the row repeats as ``prefill``.
    """
    from tqdm import tqdm

    from data.encode import render
    from models.base import processes
    from models.generation import Decoding

    loaded = answerer.loaded
    asked = [form.apply(replace(record, prompt=wrapper.wrap(record.prompt))) for record in records]
    rendered = [render(loaded.template, row) for row in asked]
    answerer.prepare([text + wrapper.start for text in rendered], args.max_new_tokens)
    # like lengths together: a batch is as slow as its longest prompt
    order = sorted(range(len(records)), key=lambda i: (len(rendered[i]), i))
    batches = [order[i : i + answerer.unit] for i in range(0, len(order), answerer.unit)]
    # units are found again by their number
    size = {} if answerer.unit == args.batch_size else {"unit": answerer.unit}
    finished = kept.begin(settings | {"batch_size": args.batch_size} | size)
    todo = [number for number in range(len(batches)) if number not in finished]
    decoding = Decoding(args.max_new_tokens, args.do_sample, args.temperature, args.top_p)
    with tqdm(total=len(batches), initial=len(finished), desc=f"{args.answers_name} {loaded.name}", unit="batch",
              **console.bar()) as bar:
        for place in processes.claimed(len(todo)):
            number, batch = todo[place], batches[todo[place]]
            begun = [rendered[i] + wrapper.start for i in batch]
            # a seed for each batch, so that a resumed run samples what an uninterrupted one would have
            answers = answerer.answer(begun, decoding, args.seed * 100_003 + number)
            kept.add(number, [
                {"index": i, "id": records[i].id, "prompt": records[i].prompt, "input": records[i].input,
                 "reference": records[i].answer, "category": records[i].category, "rendered": rendered[i],
                 "output": wrapper.answer(answer.text), "finish": answer.finish, **wrapper.marks}
                for i, answer in zip(batch, answers, strict=True)
            ])
            # what the other processes took counts too
            bar.update(len(finished) + place + 1 - bar.n)
        rows = kept.all_rows(len(batches))
        bar.update(len(batches) - bar.n)
    return rows


def write_rows(folder: Path, rows: Sequence[dict]) -> None:
    """The published CSV (index, prompts, outputs) and a JSONL with every field."""
    with (folder / "outputs_final.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        # as pandas writes a frame with its index, which is what the published evaluators read
        writer.writerow(ANSWER_COLUMNS)
        # a spreadsheet would run an answer that begins with "="
        writer.writerows([row["index"], csv_cell(row["rendered"]), csv_cell(row["output"])] for row in rows)
    with (folder / "outputs_final.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def observe(loaded: Loaded, rows: Sequence[dict], args: InferenceArgs, run: str) -> None:
    """Save the router's shares over prompts and answers as .npy (layers, experts) and as a heat-map."""
    import numpy as np

    from evaluator.reporting.figures import router_heatmap
    from models.generation import router_shares
    from models.moe.files import read_config

    names = read_config(args.results / "outputs" / run).experts if args.checkpoint_number < 0 else None
    # every nth, not the first: files are sorted by category
    step = max(1, len(rows) // _OBSERVED)
    shares = router_shares(loaded, [row["rendered"] + row["output"] for row in rows[::step]])
    folder = args.results / "observation"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{args.answers_name}_{run}" + (f"_{args.checkpoint_number}" if args.checkpoint_number >= 0 else "")
    # object arrays would be pickled; these are plain numbers
    np.save(folder / f"{stem}.npy", shares, allow_pickle=False)
    names = names or tuple(f"expert {i}" for i in range(shares.shape[1]))
    router_heatmap(shares, names, folder / f"{stem}.png", f"{run} on {args.answers_name} prompts")


def _problems(args: InferenceArgs) -> list[str]:
    """What can be known to be wrong before anything is loaded: runs, prompts that cannot be had, the attack's file."""
    problems = [problem for run in args.runs if run for problem in _missing(run, args)]
    if args.task_name in PROTOCOLS:
        from data.sets import protocols

        problems += protocols.problems(args.task_name, args.data_path, args.data_source)
    try:
        from data.prompt_styles import style

        style(args.prompt_style, args.prompt_style_file)
    except UserError as error:
        problems += error.problems
    if args.attack_file:
        from data.sets.attacks import attack

        try:
            attack(args.attack, args.attack_file)
        except UserError as error:
            problems += error.problems
    return problems


def _settings(args: InferenceArgs, wrapper: Attack, form: Style) -> dict[str, Any]:
    """The flags that the answers depend on; a file counts by its text."""
    from models.base.placement import resolved_dtype
    from models.generation.backends import resolved_backend

    said = asdict(args) | {"backend": resolved_backend(args)}
    settings = {k: v for k, v in said.items() if k not in _SELECT and not (k in _NEUTRAL and v == _NEUTRAL[k])}
    # its text counts instead (attack_text): the same file may lie elsewhere
    settings.pop("attack_file", None)
    settings.pop("prompt_style_file", None)
    # what auto stands for: the same flag on another machine gives other answers
    settings["dtype"] = resolved_dtype(args)
    if not _batches_count(args, settings["dtype"]):
        settings.pop("batch_size")
    if form.name != "none":
        settings["prompt_style_text"] = form.version
    return settings if wrapper.name == "none" else settings | {"attack_text": wrapper.version}


def _batches_count(args: InferenceArgs, dtype: str) -> bool:
    """Whether answers depend on which prompts share a batch: padding moves a bfloat16 logit, and a batch has one seed.

    In bfloat16 11 to 21 % of greedy answers differed between batches of 50 and of 7; in float32 a batch gives what its rows
    give alone.
    """
    return args.do_sample or dtype != "float32"


def _absent(args: InferenceArgs) -> dict[str, Any]:
    """What settings mean that answers of an earlier version did not record; those stay finished answers."""
    return _NEUTRAL | {"batch_size": args.batch_size}


def _meant(args: InferenceArgs) -> dict[str, Any]:
    """Answers from before the dtype was resolved say auto: for a call that says auto too they are finished."""
    return {"dtype": "auto"} if args.dtype == "auto" else {}


def _missing(run: str, args: InferenceArgs) -> list[str]:
    from models.run_folders import run_files

    try:
        run_files(args.results, run, args.checkpoint_number)
    except UserError as error:
        return [f"--cross_task: {problem}" for problem in error.problems]
    return []


def _model_hash(run: str, args: InferenceArgs, folder: Path) -> str:
    """What the answers depend on beside the flags: a retrained run must not be taken for the old one.

    Args:
        folder: of the answers, which may be there already.
    """
    from models.base.loading import base_path
    from models.checkpoints.fingerprints import fingerprint_like
    from models.run_folders import run_files

    if not run:
        there = (folder / manifest.MANIFEST).is_file()
        # answers of an earlier version recorded the base in that version's way
        recorded = (manifest.read(folder).get("config") or {}).get("model") if there else None
        return fingerprint_like(recorded, base_path(args.model_name_or_path, args.cache_dir))
    # whole files, not samples as of a base: adapters are small, and two may differ in a few values
    return ",".join(manifest.sha256(file)[:16] for file in run_files(args.results, run, args.checkpoint_number))


if __name__ == "__main__":
    main()
