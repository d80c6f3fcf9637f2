"""What the flags of every command share. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from config import ROOT, flag

#: Objective ids, in the order that H3Fusion's code uses everywhere (spec section 0).
OBJECTIVES: tuple[str, ...] = ("helpfulness", "safety", "truthfulness")
TASKS = ("truthfulness", "safety", "helpfulness", "mix")
#: What an aligned model is tuned for (SOMF, spec section 2.1). Embedded: all but Hindi and code.
SKILLS = ("english", "chinese", "hindi", "maths", "code", "summaries")
#: Sets that LoRA fusion trains its adapters on (data/sets/dialogs.py). identity is ours and embedded, the others are files
#: of yours; dialogs: any file of a known shape.
DIALOGS = ("identity", "aoa", "aoa_safety", "chatagi", "hpfa", "pure_bad", "alpaca", "dolly", "xsum", "gsm8k", "dialogs")
#: Styles whose exact text comes from a file of yours.
FILE_STYLES = ("aoa", "base", "pure_bad")
#: System text and frame around a question (data/prompt_styles.yaml).
STYLES = ("none", "orbit", "valet", "almanac", "alpaca", "dolly", *FILE_STYLES)
RAW_MOE = "raw_moe"
#: Published test sets beside the tasks' own (data/sets/protocols.yaml says how each is read and cut).
PROTOCOLS = (
    "beavertails_500", "beavertails", "beavertails_evaluation", "catqa", "catqa_full", "harmfulqa", "shadow_alignment",
    "dangerousqa", "hex_phi", "advbench", "xstest", "xstest_unsafe", "or_bench_hard", "alpacaeval_50", "alpacaeval",
    "truthfulqa_published", "truthfulqa_leak_free",
)
#: How inference.py can put a prompt (data/sets/attacks.py).
ATTACKS = ("none", "cot", "cou", "suffix", "prefill")


@dataclass(frozen=True)
class Common:
    """Flags that every command shares."""

    model_name_or_path: str = flag("embedded", "base model: 'embedded', a local folder, or a hub name")
    output_dir: str = flag(str(ROOT / "results"), "root of everything written")
    cache_dir: str | None = flag(None, "hub cache folder; empty: the hub's own default")
    dtype: str = flag("auto", "weights and matrix products; auto: bfloat16 where the processor computes in it",
                      choices=("auto", "float32", "bfloat16", "float16"))
    device: str = flag("auto", "auto: cuda when there is one, else cpu", choices=("auto", "cpu", "cuda"))
    threads: int = flag(0, "torch threads on a CPU; 0: one per core that this process may use", low=0)
    seed: int = flag(42, "seeds every random choice", low=0)
    template: str = flag("chat", "chat: the model's own chat template; alpaca: Stanford Alpaca plus an end marker; "
                                 "wizardlm: a bare response marker; llama2: Llama-2's chat format",
                         choices=("chat", "alpaca", "wizardlm", "llama2"))
    overwrite: bool = flag(False, "replace a finished run of the same name")

    takes_training_arguments: ClassVar[bool] = False

    @property
    def results(self) -> Path:
        return Path(self.output_dir).expanduser().resolve()

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common",)

    @staticmethod
    def names_everywhere() -> set[str]:
        """Names of the flags of every command; a preset's section ``common`` may hold any of them."""
        names: set[str] = set()
        kinds: list[type] = [Common]
        while kinds:
            kind = kinds.pop()
            names |= {item.name for item in fields(kind)}
            kinds += kind.__subclasses__()
        return names

    def problems(self) -> list[str]:
        return []


def name_problems(name: str, value: str | None) -> list[str]:
    if value is None or (value and all(c.isalnum() or c in "._-@+" for c in value) and not value.startswith(".")):
        return []
    return [f"{name} {value}: letters, digits, '.', '_', '-' only, and no leading dot"]
