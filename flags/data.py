"""Groups of flags: which data an objective trains on, and how its rows are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from config import flag
from flags.base import DIALOGS, SKILLS, STYLES, TASKS, Flags

#: Training tasks with rows of safety, which contrasts are mixed into.
SAFE_TASKS = ("safety", "mix", "aoa_safety")
Given = TypeVar("Given", bound="DataFlags")


@dataclass(frozen=True)
class DataFlags(Flags):
    """What every objective reads of its data."""

    heading = "Data"
    task_name: str = flag("mix", "what to train on", choices=(*TASKS, *SKILLS, *DIALOGS))
    data_path: str | None = flag(None, "file or hub name (mix: helpfulness=FILE,safety=FILE,...); empty: --data_source")
    data_source: str = flag("embedded", "where data comes from without --data_path", choices=("embedded", "published"))
    max_train_samples: int = flag(-1, "rows per objective; -1: all", low=-1)
    model_max_length: int = flag(300, "tokens, prompt + answer; longer rows are cut and counted", low=8)

    def reading(self: Given, path: str) -> Given:
        """The same flags with other data."""
        return replace(self, data_path=path)


@dataclass(frozen=True)
class RecordFlags(Flags):
    """Rows of prompt and answer; preference pairs have neither halves nor a mixture."""

    heading = "Data"
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves",
                           choices=("leak_free", "published"))
    mixing: str = flag("proportional", "mix: all rows as they are, or the same number from each objective",
                       choices=("proportional", "balanced"))
    train_on_turns: str = flag("all", "dialogs of several turns: train on every answer, or on the last one alone",
                               choices=("all", "last"))
    max_safety_samples: int | None = flag(None, "rows of safety, the contrasts and answers among them; -1: all; empty: "
                                                "--max_train_samples", low=-1)
    contrast_share: float = flag(0.0, "share of the safety rows that are contrasts (data/sets/contrasts.yaml): harmful "
                                      "requests refused beside harmless ones answered", low=0)
    answer_share: float = flag(0.0, "share of the safety rows that are answers to plain requests: embedded helpful rows "
                                    "that the helpful expert of this seed does not train on", low=0)

    @classmethod
    def idle(cls, values: dict[str, Any]) -> dict[str, str]:
        task = values.get("task_name", "mix")
        shares = () if task in SAFE_TASKS else ("max_safety_samples", "contrast_share", "answer_share")
        return {**super().idle(values), **dict.fromkeys(
            shares, f"--task_name {task} has no safety rows to mix into; drop it, or train {', '.join(SAFE_TASKS)}")}

    @property
    def safety_limit(self) -> int:
        """Rows of safety at most; -1: all."""
        # a command that has this group has DataFlags, too
        whole: Any = self
        return whole.max_train_samples if self.max_safety_samples is None else self.max_safety_samples

    def problems(self) -> list[str]:
        found = super().problems()
        if self.contrast_share + self.answer_share >= 1:
            found.append(f"--contrast_share {self.contrast_share} --answer_share {self.answer_share}: shares of the safety "
                         "rows; together below 1")
        return found


@dataclass(frozen=True)
class PaddingFlags(Flags):
    """How batches are padded."""

    heading = "Data"
    pad_to_max: bool = flag(False, "pad every batch to model_max_length instead of to its longest row")


@dataclass(frozen=True)
class FramedFlags(Flags):
    """A frame around every prompt, and rows of another set beside them (the defences of LoRA fusion)."""

    heading = "Frames and added data"
    whose = "belongs to --moe_flag 0 with --method sft, soup or search; add them or drop it"
    extra_data: str | None = flag(None, "file of more rows to train on (any known shape), e.g. a safety set; or "
                                  "reattack, embedded harmful rows")
    extra_share: float | None = flag(None, "share of all rows that come from --extra_data, e.g. 0.03; empty: all its rows")
    extra_min_rows: int = flag(1, "rows that --extra_share draws at least: 3 % of 35 rows are one", low=1)
    prompt_style: str | None = flag(None, "system text and frame around every prompt without a system text", choices=STYLES)
    prompt_style_file: str | None = flag(None, "file with the style's exact text: .txt, .yaml, or dialogs")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.extra_share is not None and not (self.extra_data and 0 < self.extra_share < 1):
            found.append(f"--extra_share {self.extra_share}: goes with --extra_data and lies between 0 and 1")
        if self.extra_min_rows > 1 and self.extra_share is None:
            found.append(f"--extra_min_rows {self.extra_min_rows}: goes with --extra_share; add it or drop this")
        if self.prompt_style_file and not self.prompt_style:
            found.append("--prompt_style_file: belongs to a style; add --prompt_style")
        return found
