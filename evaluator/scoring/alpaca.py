"""AlpacaEval through its own command: answers and references out, its leaderboard back into scores and registry.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN --alpaca_eval 50

The published setting is AlpacaEval 1: annotator alpaca_eval_gpt4, IS_ALPACA_EVAL_2=False, the first 50 prompts or all 805.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import manifest
from data.prompts import END_MARKER
from errors import UserError
from evaluator.scoring import engine
from evaluator.statistics import bounded, metrics
from flags.judge_flags import OPENAI

if TYPE_CHECKING:
    from evaluator.scoring.engine import Result, Subject, Work
    from flags import EvaluateHelpfulnessArgs

COMMAND = "alpaca_eval"
#: Name of the scores, beside alpaca_eval.json, the exported answers.
SCORES = "evaluate_alpaca"
WIN = ("alpaca_eval: share of answers that its annotator prefers to the reference, ties count half; interval from its own "
       "standard error (normal)")
CONTROLLED = "alpaca_eval: win rate with the effect of length taken out (AlpacaEval 2), interval likewise"
#: The normal distribution's 97.5 % point: alpaca_eval gives a standard error, not an interval.
_NORMAL = 1.959964


def check(args: EvaluateHelpfulnessArgs) -> None:
    """Everything that --alpaca_eval needs, before any model is loaded: the command, and answers with references.

    Raises:
        UserError: with all that is missing.
    """
    problems = [] if executable() else [
        f"--alpaca_eval {args.alpaca_eval}: the command {COMMAND} is not installed; pip install -r requirements.txt"]
    for subject in engine.subjects(args):
        try:
            exported(args, subject)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def evaluate(args: EvaluateHelpfulnessArgs) -> list[Path]:
    """Score every subject; one already scored with the same answers and settings is left as it is."""
    return engine.evaluate(args, SCORES, plan)


def plan(args: EvaluateHelpfulnessArgs, subject: Subject) -> Work:
    """What a subject's win rate depends on and how it is made."""
    outputs, references = exported(args, subject)
    inputs = {"answers": engine.content_hash(outputs), "references": engine.content_hash(references),
              "annotator": args.alpaca_annotator, "endpoint": args.judge_base_url}
    return engine.Work(inputs, lambda: score(args, subject, outputs, references))


def exported(args: EvaluateHelpfulnessArgs, subject: Subject) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first --alpaca_eval answers (-1: all) and their references as alpaca_eval reads them.

    Raises:
        UserError: there are no answers, or some have no reference.
    """
    rows = engine.answers(args, args.answers_task, subject)
    rows = rows[: args.alpaca_eval] if args.alpaca_eval >= 0 else rows
    bare = sum(not row["reference"] for row in rows)
    if bare:
        raise UserError(f"--alpaca_eval {args.alpaca_eval}: {bare} of {len(rows)} answers of {subject.name} have no "
                        "reference to compare with; make them with: "
                        f"{engine.inference_command(args, 'helpfulness', subject)}")
    return layout(rows, subject.name)


def layout(rows: list[dict[str, Any]], name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Answers, and the references that are known, as alpaca_eval reads them.

    New lines stay: words on either side would be glued together. The end marker goes.
    """
    asked = [f"{row['prompt']}\n\n{row['input']}" if row["input"] else row["prompt"] for row in rows]
    outputs = [{"instruction": text, "output": row["output"].split(END_MARKER)[0].strip(), "generator": name}
               for text, row in zip(asked, rows, strict=True)]
    references = [{"instruction": text, "output": row["reference"], "generator": "reference"}
                  for text, row in zip(asked, rows, strict=True) if row["reference"]]
    return outputs, references


def score(args: EvaluateHelpfulnessArgs, subject: Subject, outputs: list[dict], references: list[dict]) -> Result:
    """Run the command in results/scores/{sub}/alpaca_eval and read what it wrote."""
    folder = args.results / "scores" / subject.sub / COMMAND
    leaderboard = folder / Path(args.alpaca_annotator).name / "leaderboard.csv"
    # what an earlier call left there must not be read as this one's
    leaderboard.unlink(missing_ok=True)
    manifest.write_json(folder / "model_outputs.json", outputs)
    manifest.write_json(folder / "reference_outputs.json", references)
    _run(args, subject.name, folder)
    row = read_leaderboard(leaderboard, subject.name)
    n = int(row["n_total"])
    # n as it was judged: alpaca_eval drops rows whose annotation failed
    rows = _rows(leaderboard.with_name("annotations.json"), outputs)
    scores = [_seen(_score(row, "win_rate", "alpaca_eval.win_rate", WIN, n), rows)]
    if not math.isnan(row["length_controlled_winrate"]):
        scores.append(_score(row, "length_controlled_winrate", "alpaca_eval.length_controlled", CONTROLLED, n))
    details = {"annotator": args.alpaca_annotator, "answers_task": args.answers_task, "sent": len(outputs),
               "unjudged": len(outputs) - n}
    return engine.Result(scores, rows, details)


def _seen(score: metrics.Score, rows: list[dict[str, Any]]) -> metrics.Score:
    """The win rate with an interval also where (nearly) all rows agree: alpaca_eval's standard error is 0 there."""
    if len(rows) < 2 or math.isnan(score.low):
        return score
    values = [line["values"]["alpaca_eval.win_rate"] for line in rows]
    low, high = bounded.widened((score.low, score.high), values, (0, 1))
    return replace(score, low=low, high=high)


def executable() -> str | None:
    """The path of the alpaca_eval command: on PATH, or beside this interpreter."""
    return shutil.which(COMMAND) or shutil.which(COMMAND, path=str(Path(sys.executable).parent))


def _run(args: EvaluateHelpfulnessArgs, name: str, folder: Path) -> None:
    """Run the command; its words go to alpaca_eval.log, without the key."""
    program, key = executable(), os.environ.get(args.judge_key_variable, "").strip()
    if program is None:
        raise UserError(f"--alpaca_eval {args.alpaca_eval}: the command {COMMAND} is not installed")
    # alpaca_eval keeps paid annotations by texts and annotator only: another endpoint gets a file of its own
    kept = folder / f"annotations_{hashlib.blake2b(args.judge_base_url.encode(), digest_size=4).hexdigest()}.json"
    if not kept.exists():
        # 0.6.6 with pandas 3 cannot read back whole numbers alone; a tie of nothing keeps the column a fraction's
        manifest.write_json(kept, [{"instruction": "", "output_1": "", "output_2": "", "annotator": args.alpaca_annotator,
                                    "preference": 1.5}])
    flags = {
        "model_outputs": folder / "model_outputs.json", "reference_outputs": folder / "reference_outputs.json",
        "annotators_config": args.alpaca_annotator, "output_path": folder, "caching_path": kept,
        # quoted: a name of digits is no number; no other model's rows: only this comparison is ours
        "name": json.dumps(name), "precomputed_leaderboard": None, "is_overwrite_leaderboard": True,
    }
    where = {} if args.judge_base_url == OPENAI else {"OPENAI_BASE_URL": args.judge_base_url,
                                                      "OPENAI_API_BASE": args.judge_base_url}
    # alpaca_eval takes these from the environment, when it is imported
    environment = os.environ | where | {
        "IS_ALPACA_EVAL_2": str(args.alpaca_annotator.startswith("weighted_")), "OPENAI_API_KEY": key or "none",
        "OPENAI_MAX_CONCURRENCY": str(args.judge_concurrency),
    }
    ended = subprocess.run([program, *(f"--{flag}={value}" for flag, value in flags.items())], env=environment,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    # its words go into a file, where no key may stand
    words = ended.stdout.replace(key, "***") if key else ended.stdout
    (folder / "alpaca_eval.log").write_text(words, encoding="utf-8")
    if ended.returncode:
        last = words.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"--alpaca_eval {args.alpaca_eval}: {COMMAND} ended with code {ended.returncode} "
                        f"({last[0].strip()}); all it said: {folder / 'alpaca_eval.log'}")


def read_leaderboard(path: Path, name: str) -> dict[str, float]:
    """The numbers of one model's row in an alpaca_eval leaderboard (rates in percent); NaN where a cell is empty.

    Raises:
        UserError: no such file, no such row, or a win rate that is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # the name of a model is the frame's index, a column without a name
            rows = {row.get("") or "": row for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {COMMAND} left no leaderboard that can be read ({error})") from None
    if name not in rows:
        raise UserError(f"{path}: has no row {name}; rows: {', '.join(rows) or 'none'}")
    wanted = ("win_rate", "standard_error", "n_total", "length_controlled_winrate", "lc_standard_error")
    numbers = {column: _number(rows[name].get(column)) for column in wanted}
    if not (0 <= numbers["win_rate"] <= 100 and numbers["n_total"] >= 1):
        raise UserError(f"{path}: row {name} has win_rate {rows[name].get('win_rate')!r} and n_total "
                        f"{rows[name].get('n_total')!r}; needs a rate of 0 to 100 over at least one answer")
    return numbers


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def _score(row: dict[str, float], column: str, name: str, definition: str, n: int) -> metrics.Score:
    error = row["standard_error" if column == "win_rate" else "lc_standard_error"] * _NORMAL / 100
    value = row[column] / 100
    low, high = max(0.0, value - error), min(1.0, value + error)
    # max and min swallow a NaN
    return metrics.Score(value, *((low, high) if error == error else (math.nan, math.nan)), n, name, definition, True)


def _rows(path: Path, outputs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One line per judged answer: 1 for a win, 0 for a loss, 0.5 for a tie (alpaca_eval writes 2, 1 and 1.5)."""
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))
        preferences = {(row["instruction"], row["output_2"]): row["preference"] for row in annotations}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {COMMAND} left no annotations that can be read ({error})") from None
    lines = []
    for i, row in enumerate(outputs):
        preference = preferences.get((row["instruction"], row["output"]))
        if isinstance(preference, int | float) and not math.isnan(preference):
            # 0 is alpaca_eval's other way to write a tie
            value = 0.5 if preference == 0 else round(preference - 1, 6)
            lines.append({"set": COMMAND, "id": str(i), "category": "",
                          "prompt_hash": engine.prompt_hash(row["instruction"]), "values": {"alpaca_eval.win_rate": value}})
    return lines
