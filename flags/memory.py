"""Which settings of a command need less memory: what it says when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Halved one by one; the first that a command has does the most.
_HALVED = ("batch_size", "batch_tokens", "judge_batch_tokens", "harness_batch_size")
_LENGTHS = ("model_max_length", "max_new_tokens")
_ROWS, _STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


def smaller(args: Any, training: Mapping[str, Any] | None = None) -> list[str]:
    """Flags with values that need less than now, the most promising first.

    Args:
        args: a command's flags.
        training: transformers' training arguments, where it takes them.
    """
    now = {**vars(args), **(training or {})}
    found = []
    if (rows := _number(now.get(_ROWS))) > 1:
        steps = max(1, _number(now.get(_STEPS)))
        found.append(f"--{_ROWS} {rows // 2} --{_STEPS} {steps * 2} (as many rows a step as now)")
    if training is not None and not training.get("gradient_checkpointing"):
        found.append("--gradient_checkpointing true")
    found += [f"--{name} {now[name] // 2} (now {now[name]})" for name in _HALVED if _number(now.get(name)) > 1]
    if "memory_gb" in now:
        found.append(f"--memory_gb {now['memory_gb'] / 2:g}" if now["memory_gb"] else "--memory_gb 1")
    if "base_quantization" in now and not now["base_quantization"]:
        found.append("--base_quantization nf4")
    if str(now.get("dtype")) == "float32":
        found.append("--dtype bfloat16")
    return found + [f"--{name} {now[name] // 2} (now {now[name]})" for name in _LENGTHS if _number(now.get(name)) > 1]


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
