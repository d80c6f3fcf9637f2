"""What the evaluators share: subjects, answers, test subsets, and scores that are written once and found again."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import locks
import manifest
from data import escaped
from data.records import stable_hash
from errors import UserError, fits
from evaluator.scoring import computed
from evaluator.statistics.score_files import score_lines
from flags import EvaluateArgs
from flags.base import ATTACKS, ModelCommand
from flags.judges import JudgeFlags
from flags.memory import smaller

if TYPE_CHECKING:
    from evaluator.statistics.metrics import Score

log = logging.getLogger(__name__)
_LONGEST_FIELD = 2**30  # csv's own limit is shorter than a long answer
Row = TypeVar("Row")
Args = TypeVar("Args", bound=EvaluateArgs)
#: What a registry line and a score file both hold.
_SHARED = ("run", "sub", "command", "scores", "seed", "split", "inputs", "rows_sha256")
#: Flags that choose among subjects or decide how fast, not what, is measured.
_SELECT = ("task_name", "aligned_flag", "checkpoint_number", "batch_tokens", "output_dir", "cache_dir", "threads",
           "overwrite", "device", "device_map", "answers", "overrefusal_answers", "name",
           "judge_batch_tokens", "judge_concurrency", "judge_retries", "judge_timeout",
           "judge_key_variable", "judge_prices", "max_cost", "alpaca_eval", "alpaca_annotator",
           "data_dir", "harness_batch_size", "harmful", "harmless", "pairs", "openers", "set_name")
#: What an answer may lack.
_EMPTY = {"input": "", "reference": "", "category": "", "finish": ""}
#: Flags that came later than the first scores: left out of the settings where they change nothing.
_NEUTRAL = {"unsafe_code": "no"}


@dataclass(frozen=True)
class Subject:
    """What is scored: ``sub`` is its folder (raw, cross_RUN, cross_RUN_N), ``run`` its run ("" for the base)."""

    sub: str
    run: str

    @property
    def name(self) -> str:
        return self.sub.removeprefix("cross_") if self.run else "base"


@dataclass
class Result:
    """Scores of one command, the rows behind them, and what else the JSON should say.

    Args:
        rows: each {"set", "id", "category", "prompt_hash", "values": {name: number}}; the report pairs models by (set, id)
            where the prompts' hashes agree.
    """

    scores: list[Score]
    rows: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One subject's planned evaluation: hashes of all it depends on, and the function that does it."""

    inputs: dict[str, str]
    compute: Callable[[], Result]


def subjects(args: EvaluateArgs) -> list[Subject]:
    """The subjects that --task_name names; a UserError for a name that is no folder of inference.py."""
    if getattr(args, "answers", None):
        return [Subject(name, name) for name in args.folders]
    # every subject is looked at before anything is raised: a sweep names dozens
    named, problems = [], []
    for name in args.folders:
        if name in ("raw", "base"):
            named.append(Subject("raw", ""))
        elif name.startswith("cross_") and name != "cross_":
            suffix = f"_{args.checkpoint_number}" if args.checkpoint_number >= 0 else ""
            named.append(Subject(name + suffix, name.removeprefix("cross_")))
        else:
            problems.append(f"--task_name {name}: no folder of answers is called so; allowed: raw, cross_RUN "
                            f"(did you mean cross_{name}?)")
    if problems:
        raise UserError(*problems)
    return named


def evaluate(args: EvaluateArgs, command: str, plan: Callable[[EvaluateArgs, Subject], Work]) -> list[Path]:
    """Score every subject; those already scored with the same inputs and settings are left as they are.

    Returns:
        The score files, one per subject: results/scores/{sub}/{command}.json, with {command}.rows.jsonl beside each.

    Raises:
        UserError: with the problems of all subjects, before any model is loaded.
    """
    return evaluate_all([(args, command)], plan)


def evaluate_all(asked: Sequence[tuple[Args, str]], plan: Callable[[Args, Subject], Work]) -> list[Path]:
    """The same for several commands over the same subjects: each has its own files and is found again by itself.

    Args:
        asked: (flags, command) of each; the flags name the same subjects.
    """
    from models.base import processes

    processes.join()
    if asked and asked[0][0].device_map:
        from models.base import spread

        spread.check(asked[0][0])
    # all plans before the first model: a folder that is missing must not show after an hour of scoring
    planned, problems = [], []
    # subject by subject, so that a model that several commands share need be loaded once
    for subject in subjects(asked[0][0]) if asked else ():
        for args, command in asked:
            try:
                planned.append((args, command, subject, work := plan(args, subject)))
                if not subject.run:
                    problems += filter(None, [computed.another_base(_path(args, subject, command), args, work.inputs)])
            except UserError as error:
                problems.extend(error.problems)
    if problems:
        # each once: several commands ask for the same answers
        raise UserError(*dict.fromkeys(problems))
    from models.runs import keeping_base

    with keeping_base():
        return [_evaluate_one(*one) for one in planned]


def command_of(command: str, *tasks: tuple[str, str]) -> str:
    """The name of a command's scores: sets other than the usual ones, (asked for, usual), are part of it, so that no score
    stands for another."""
    return ".".join([command, *(task for task, usual in tasks if task != usual)])


def _path(args: EvaluateArgs, subject: Subject, command: str) -> Path:
    return args.results / "scores" / subject.sub / f"{command}.json"


def _evaluate_one(args: EvaluateArgs, command: str, subject: Subject, work: Work) -> Path:
    from models.base import processes

    path = _path(args, subject, command)
    # the model's own scores depend on dtype and batches; judges of answers have versions of their own
    model = computed.settings(args) if "model" in work.inputs else {}
    settings = _settings(args) | model
    if processes.agreed(lambda: locks.wait_for(path) or _scored(args, path, settings, work)):
        return path
    # of several processes the first writes, and the others must not wait for its lock
    with locks.alone(path) if processes.rank() == 0 else contextlib.nullcontext() as waited:
        if not processes.agreed(lambda: bool(waited) and _scored(args, path, settings, work)):
            start = time.monotonic()
            # all processes have a share in it
            with fits(smaller(args)):
                result = work.compute()
            if processes.rank() == 0:
                _write(args, command, subject, work, path, settings, model, result, start)
        processes.wait()
    return path


def _scored(args: EvaluateArgs, path: Path, settings: dict[str, Any], work: Work) -> bool:
    """Whether the scores are there already; a line that they lack in the registry is added."""
    # rows are part of a score: without them no difference can be computed
    if args.overwrite or not path.with_suffix(".rows.jsonl").is_file() or not computed.same(
            path, settings, work.inputs, args.dtype):
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    log.info("%s: already scored with these answers and settings\n%s", path, score_lines(content["scores"]))
    _register_missing(args.results, _line(content))
    return True


def _write(args: EvaluateArgs, command: str, subject: Subject, work: Work, path: Path, settings: dict[str, Any],
           model: dict[str, Any], result: Result, start: float) -> None:
    """Write scores and rows, and the line of the registry."""
    rows_path = path.with_suffix(".rows.jsonl")
    # rows first, their hash in the scores: a kill between both files is noticed at the next call
    _write_rows(rows_path, result.rows)
    made = computed.made_with(args, subject.sub, (row["set"] for row in result.rows), model)
    content = {
        "run": subject.name, "sub": subject.sub, "command": command, "split": args.dataset_type,
        "scores": {score.name: score.as_dict() for score in result.scores}, **result.details,
        **({"made_with": made} if made else {}), "config": settings,
        "inputs": work.inputs, "rows_sha256": manifest.sha256(rows_path), "seed": args.seed,
        "seconds": round(time.monotonic() - start, 1),
    }
    manifest.write_json(path, content)
    # last: reports read the registry, and must find the files that a line speaks of
    manifest.register(args.results, _line(content))
    log.info("%s  (%.0f s)  %s\n%s", subject.name, time.monotonic() - start, path, score_lines(content["scores"]))


def _settings(args: EvaluateArgs) -> dict[str, Any]:
    """Flags that change the scores; those of the judges choose nothing where no judge is named."""
    judging = {f.name for f in fields(JudgeFlags)} - {f.name for f in fields(ModelCommand)}
    unused = () if getattr(args, "judges", "") else judging
    return {k: v for k, v in asdict(args).items() if k not in _SELECT and k not in unused
            and not (k in _NEUTRAL and v == _NEUTRAL[k])}


def _line(content: dict[str, Any]) -> dict[str, Any]:
    """A score file's line for the registry."""
    details = {key: value for key, value in content.items() if key not in (*_SHARED, "config", "seconds")}
    return {"kind": "score", **{key: content[key] for key in _SHARED if key in content}, "details": details}


def _register_missing(results: Path, line: dict[str, Any]) -> None:
    """Append a score file's line where it is not the newest of its kind: a kill came between the file and its line."""
    newest: dict[str, Any] = next(
        (row for row in reversed(manifest.registry(results)) if row.get("kind") == "score"
         and (row.get("sub"), row.get("command")) == (line["sub"], line["command"])), {})
    # as text: a NaN in the details is no other NaN
    same = (json.dumps({k: v for k, v in row.items() if k != "time"}, sort_keys=True) for row in (newest, line))
    if len(set(same)) > 1:
        manifest.register(results, line)
        log.info("%s, %s: its line was missing in the registry and is there now", line["run"], line["command"])


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a reader never sees half of it
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.replace(path)


def answers_folder(args: EvaluateArgs, task: str, subject: Subject) -> Path:
    """Where inference.py puts this subject's answers."""
    return args.results / "inference" / task / args.dataset_type / subject.sub


def inference_command(args: EvaluateArgs, task: str, subject: Subject) -> str:
    """The command line that makes a missing folder of answers."""
    which = f"--cross_task {subject.run}" if subject.run else "--aligned_flag 0"
    step = f" --checkpoint_number {args.checkpoint_number}" if subject.run and args.checkpoint_number >= 0 else ""
    task, *ways = task.split("+")
    put = "".join(f" --{'attack' if way in ATTACKS else 'prompt_style'} {way}" for way in ways)
    return f"python inference.py --task_name {task}{put} {which}{step} --dataset_type {args.dataset_type}"


def answers(args: EvaluateArgs, task: str, subject: Subject) -> list[dict[str, Any]]:
    """A subject's answers to a task's prompts, or those of the file that --answers names.

    Raises:
        UserError: there are none yet; says which folder is missing and which command makes it.
    """
    if file := getattr(args, "answers", None):
        from data.readers.answer_files import read_answer_file

        return read_answer_file(file, "--answers")
    folder = answers_folder(args, task, subject)
    if not has_answers(args, task, subject):
        raise UserError(f"{folder}: no answers here; make them with: {inference_command(args, task, subject)}")
    from data.readers.answer_text import judged

    rows = judged(read_answers(folder), str(folder))
    if not rows:
        raise UserError(f"{folder}: holds no answer; remove it and run: {inference_command(args, task, subject)}")
    return rows


def has_answers(args: EvaluateArgs, task: str, subject: Subject) -> bool:
    """Whether answers to this task were generated, or a file of them was given."""
    if getattr(args, "answers", None):
        return True
    folder = answers_folder(args, task, subject)
    return any((folder / f"outputs_final.{kind}").is_file() for kind in ("jsonl", "csv"))


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Rows {id, prompt, input, reference, category, rendered, output, finish}; an empty answer is "", never NaN.

    Reads outputs_final.jsonl, or the published CSV (whose prompt is the rendered text and whose rows have no category).

    Raises:
        UserError: lines that are no answers, each with its number.
    """
    path = folder / "outputs_final.jsonl"
    if path.is_file():
        rows = _answer_rows(path)
    else:
        csv.field_size_limit(_LONGEST_FIELD)
        with (folder / "outputs_final.csv").open(encoding="utf-8", newline="") as file:
            table = escaped.read_answers(csv.DictReader(file))
        if table and not {"prompts", "outputs"} <= set(table[0]):
            raise UserError(f"{folder / 'outputs_final.csv'}: needs the columns prompts and outputs, has "
                            f"{', '.join(map(str, table[0]))}")
        rows = [{"id": row.get("") or str(i), "prompt": row["prompts"], "output": row["outputs"]}
                for i, row in enumerate(table)]
    return [{**_EMPTY, "id": str(i), **row, "output": _text(row["output"])} for i, row in enumerate(rows)]


def _answer_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; answer again with inference.py --overwrite") from None
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if problem := _answer_problem(row):
            problems.append(f"{path}, line {number}: {problem}")
        else:
            texts = {key: "" for key in _EMPTY if key in row and row[key] is None}
            # half a surrogate pair can be read and not be written
            rows.append({key: value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                         if isinstance(value, str) else value for key, value in (row | texts).items()})
    if problems:
        raise UserError(*problems[:20], f"{path}: answer again with inference.py --overwrite")
    return rows


def _answer_problem(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or "output" not in row:
        return "no answer with prompt and output"
    if "id" in row and (isinstance(row["id"], bool) or not isinstance(row["id"], str | int)):
        return f"id {row['id']!r} is neither text nor a number"
    odd = [key for key in (*_EMPTY, "rendered") if not isinstance(row.get(key), str | None)]
    return f"{', '.join(odd)} must be text" if odd else ""


def _text(value: Any) -> str:
    """An answer; None and NaN, as data frames write an empty cell, are empty ones."""
    return "" if value is None or value != value else str(value)


def subset(rows: Sequence[Row], n: int, key: Callable[[Row], str]) -> list[Row]:
    """n rows (all if n is negative), chosen by a hash of their key and not by position, in their old order."""
    if n < 0 or n >= len(rows):
        return list(rows)
    # by hash: files are sorted by category, and a larger n must hold the rows of a smaller one
    chosen = set(sorted(range(len(rows)), key=lambda i: (stable_hash(key(rows[i]), "subset"), i))[:n])
    return [row for i, row in enumerate(rows) if i in chosen]


def content_hash(rows: Iterable[Any]) -> str:
    """A short hash of rows: scores made from other rows are recomputed."""
    digest = hashlib.blake2b(digest_size=12)
    for row in rows:
        # repr tells "1" from 1; the zero byte keeps rows apart
        digest.update(f"{row!r}\0".encode())
    return digest.hexdigest()


def prompt_hash(*parts: str) -> str:
    """A short hash of what a row asks, for the rows file: rows with one id but other words are not compared."""
    return content_hash(parts)


def model_hash(args: EvaluateArgs, subject: Subject) -> str:
    """A hash of the weights that are scored; a UserError names the folder when the run does not exist."""
    from models.base.loading import base_path
    from models.checkpoints.fingerprints import fingerprint
    from models.run_folders import run_files

    # the base counts for a run as well: an adapter on another base is another model
    base = fingerprint(base_path(args.model_name_or_path, args.cache_dir))
    if not subject.run:
        return base
    files = run_files(args.results, subject.run, args.checkpoint_number)
    return ",".join([base[:16], *(manifest.sha256(file)[:16] for file in files)])


def load(args: EvaluateArgs, subject: Subject) -> Any:
    """The subject's model, ready to score."""
    from models.runs import load_run

    return load_run(subject.run, args)
