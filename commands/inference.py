"""Flags of inference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from commands.base import Common
from config import flag


@dataclass(frozen=True)
class InferenceArgs(Common):
    """Answer a test set with one or several trained runs.

    python inference.py --task_name safety --cross_task mix_moe_reg_00000_00000_00000_gate_00100 --dataset_type test
    """

    task_name: str = flag("helpfulness", "whose prompts", choices=("helpfulness", "safety", "truthfulness", "overrefusal"))
    cross_task: str = flag("", "run to answer with (several: separated by commas); empty: the raw base model")
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    aligned_flag: int = flag(1, "0: the raw base model, whatever --cross_task says", choices=(0, 1))
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    num_samples: int = flag(-1, "n prompts, drawn by a hash of the text; -1: all", low=-1)
    data_path: str | None = flag(None, "local file or hub name of the prompts; empty: --data_source")
    data_source: str = flag("embedded", "where prompts come from without --data_path", choices=("embedded", "published"))
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves", choices=("leak_free", "published"))
    do_sample: bool = flag(False, "sample instead of greedy decoding")
    temperature: float = flag(0.6, "sampling temperature", low=0.01)
    top_p: float = flag(1.0, "nucleus", low=0.01)
    max_new_tokens: int = flag(512, "answer length limit", low=1)
    batch_size: int = flag(32, "prompts per batch", low=1)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "inference")

    @property
    def runs(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("",)
        names = [name.strip() for name in self.cross_task.split(",")]
        return tuple("" if name in ("base", "raw") else name for name in names)
