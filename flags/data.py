"""Groups of flags: which data an objective trains on, and how its rows are made."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import DIALOGS, SKILLS, STYLES, TASKS, Flags


@dataclass(frozen=True)
class DataFlags(Flags):
    """What every objective reads of its data."""

    heading = "Data"
    task_name: str = flag("mix", "what to train on", choices=(*TASKS, *SKILLS, *DIALOGS))
    data_path: str | None = flag(None, "file or hub name (mix: helpfulness=FILE,safety=FILE,...); empty: --data_source")
    data_source: str = flag("embedded", "where data comes from without --data_path", choices=("embedded", "published"))
    max_train_samples: int = flag(-1, "rows per objective; -1: all", low=-1)
    model_max_length: int = flag(300, "tokens, prompt + answer; longer rows are cut and counted", low=8)


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
    prompt_style: str | None = flag(None, "system text and frame around every prompt without a system text", choices=STYLES)
    prompt_style_file: str | None = flag(None, "file with the style's exact text: .txt, .yaml, or dialogs")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.extra_share is not None and not (self.extra_data and 0 < self.extra_share < 1):
            found.append(f"--extra_share {self.extra_share}: goes with --extra_data and lies between 0 and 1")
        if self.prompt_style_file and not self.prompt_style:
            found.append("--prompt_style_file: belongs to a style; add --prompt_style")
        return found
