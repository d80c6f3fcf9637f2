"""Flags of evaluator/evaluate_utility.py."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from config import flag
from flags.evaluate import EvaluateArgs

#: Benchmarks that lm-eval runs, with the papers' number of shots (SOMF, spec section 2.4; LoRA fusion: MMLU 5-shot).
BENCHMARKS: dict[str, int] = {"copa": 0, "xcopa_zh": 0, "xnli_hi": 0, "gsm8k": 5, "mmlu": 5, "humaneval": 0}
#: Embedded probes (data/sets/probes.py) and how many rows each takes by default. No number from them is a benchmark's.
PROBES: dict[str, int] = {"mmlu_probe": 40, "openbookqa_probe": 40, "commonsenseqa_probe": 40, "piqa_probe": 40,
                          "asdiv_probe": 16, "gsm8k_probe": 0}
#: What the word `probes` stands for: all that have rows by default.
DEFAULT_PROBES = tuple(name for name, rows in PROBES.items() if rows)
GSM8K_FILTERS = ("strict-match", "flexible-extract")
#: Flags that only some tasks look at: another value of one makes no other task's scores anew.
LOOKED_AT_BY: dict[str, tuple[str, ...]] = {
    "num_fewshot": tuple(BENCHMARKS), "gsm8k_filter": ("gsm8k",), "max_new_tokens": ("asdiv_probe", "gsm8k_probe"),
    "allow_code_execution": ("humaneval",), "code_seconds": ("humaneval",), "code_memory_mb": ("humaneval",),
    "unsafe_code": ("humaneval",)}


@dataclass(frozen=True)
class EvaluateUtilityArgs(EvaluateArgs):
    """Utility: benchmarks through lm-eval, or embedded probes where no benchmark data is at hand.

    cd evaluator; python evaluate_utility.py --task_name cross_RUN --tasks copa,xcopa_zh,xnli_hi,gsm8k,mmlu
    cd evaluator; python evaluate_utility.py --task_name cross_RUN --tasks probes
    """

    heading, general = "Benchmarks and probes", False
    tasks: str = flag("probes", f"commas; of lm-eval: {', '.join(BENCHMARKS)}; embedded: probes (the first five), "
                                f"{', '.join(PROBES)}")
    data_dir: str = flag("", "folder with TASK.jsonl, .json or .parquet (or TASK/SPLIT.*) of the lm-eval tasks; empty: the "
                             "hub or its cache")
    num_fewshot: int = flag(-1, "shots of every lm-eval task; -1: the papers' (gsm8k and mmlu 5, else 0)", low=-1)
    gsm8k_filter: str = flag("strict-match", "which of lm-eval's two readings of a GSM8K answer is scored: the number after "
                                             "####, or the last number; the other one goes to the details",
                             choices=GSM8K_FILTERS)
    max_new_tokens: int = flag(48, "tokens that a number probe may write", low=1)
    harness_batch_size: int = flag(8, "rows of one batch of lm-eval and of the number probes", low=1)
    allow_code_execution: bool = flag(False, "humaneval: run the code that the model wrote on this machine, in a process "
                                             "that the kernel confines (docs/security.md)")
    unsafe_code: str = flag("no", "humaneval: yes runs that code with limits on time and memory alone, for where the kernel "
                                  "does not confine it; it may then do whatever you may", choices=("no", "yes"))
    code_seconds: int = flag(5, "humaneval: seconds of one program", low=1)
    code_memory_mb: int = flag(512, "humaneval: address space of one program in MB", low=64)

    @property
    def task_names(self) -> tuple[str, ...]:
        named = [name.strip() for name in self.tasks.split(",") if name.strip()]
        spread = [name for word in named for name in (DEFAULT_PROBES if word == "probes" else (word,))]
        return tuple(dict.fromkeys(spread))

    def only(self, name: str) -> EvaluateUtilityArgs:
        """The flags of one task by itself: those that it does not look at have their defaults."""
        unused: dict[str, Any] = {f.name: f.default for f in fields(self) if name not in LOOKED_AT_BY.get(f.name, (name,))}
        return replace(self, tasks=name, **unused)

    def rows_of(self, name: str) -> int:
        """How many rows of a probe are scored: --num_samples, or the default that keeps the whole evaluation short."""
        return self.num_samples if self.num_samples >= 0 else PROBES[name] or -1

    def problems(self) -> list[str]:
        known = ("probes", *BENCHMARKS, *PROBES)
        found = super().problems()
        for name in self.task_names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                found.append(f"--tasks {name}: not known{f' (did you mean {near[0]}?)' if near else ''}; "
                             f"allowed: {', '.join(known)}")
        if not self.task_names:
            found.append(f"--tasks: name at least one; allowed: {', '.join(known)}")
        if "humaneval" in self.task_names and not self.allow_code_execution:
            found.append("--tasks humaneval: scoring it runs code that the model wrote; add --allow_code_execution, best on "
                         "a machine or in a container that you can throw away, or drop humaneval")
        return found
