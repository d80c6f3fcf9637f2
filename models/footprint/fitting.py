"""Settings that take less memory, nearest first: what a plan that does not fit tells beside its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flags import DpoArgs, EvaluateArgs, ExpertArgs, FusedMoeArgs, InferenceArgs, MaskArgs, SearchArgs, SoupArgs

#: Most devices that are suggested.
_MOST = 64


def smaller(args: Any, extra: Mapping[str, Any], cuda: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(words for the command line, flags, training arguments) of smaller settings on the same devices, nearest first.

    First those that compute the same step: fewer rows at a time with as many more accumulated, layers computed again. Then
    those that hold the base or the mask otherwise. Shorter rows come last, for they are other data.
    """
    if isinstance(args, InferenceArgs):
        yield from ((f"--batch_size {rows}", replace(args, batch_size=rows), {}) for rows in _halves(args.batch_size))
    elif isinstance(args, EvaluateArgs):
        yield from ((f"--batch_tokens {n}", replace(args, batch_tokens=n), {}) for n in _halves(args.batch_tokens, 64))
    elif isinstance(args, SearchArgs) and not isinstance(args, SoupArgs):
        yield from ((f"--per_device_train_batch_size {rows}", replace(args, per_device_train_batch_size=rows), {})
                    for rows in _halves(args.per_device_train_batch_size))
    elif isinstance(args, ExpertArgs | DpoArgs | MaskArgs | FusedMoeArgs | SoupArgs):
        yield from _training(args, dict(extra), cuda)


def _training(args: Any, extra: dict[str, Any], cuda: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    again = bool(extra.get("gradient_checkpointing"))
    checkpointed = extra | {"gradient_checkpointing": True}
    yield from ((words, one, extra) for words, one in _fewer_rows(args))
    held = [] if again else ["--gradient_checkpointing true"]
    if held:
        yield held[0], args, checkpointed
        yield from ((f"{held[0]} {words}", one, checkpointed) for words, one in _fewer_rows(args))
    last = [("", args)]
    if isinstance(args, MaskArgs):
        narrow = replace(args, storage="bfloat16")
        last = [(f"--storage bfloat16 --granularity {by}", replace(narrow, granularity=by)) for by in ("block", "row")]
        bits = replace(narrow, logit_dtype="bfloat16")
        # with another optimiser than AdamW the command would refuse such logits
        if not bits.clashes(extra):
            last.insert(0, ("--storage bfloat16 --logit_dtype bfloat16", bits))
    elif getattr(args, "tuning", None) == "full":
        last = [("--tuning lora", replace(args, tuning="lora"))]
        if cuda:
            last.append(("--tuning lora --base_quantization nf4", replace(args, tuning="lora", base_quantization="nf4")))
    elif cuda and hasattr(args, "base_quantization") and args.base_quantization != "nf4":
        last = [("--base_quantization nf4", replace(args, base_quantization="nf4"))]
    for words, one in last:
        for fewer, row in [("", one), *_fewer_rows(one)]:
            yield " ".join(filter(None, (words, *held, fewer))), row, checkpointed
    words, one = last[-1]
    *_, (fewer, one) = [("", one), *_fewer_rows(one)]
    for length in _halves(one.model_max_length, 64):
        yield (" ".join(filter(None, (words, *held, fewer, f"--model_max_length {length}"))),
               replace(one, model_max_length=length), checkpointed)


def _fewer_rows(args: Any) -> Iterator[tuple[str, Any]]:
    """Half the rows at a time and twice as many times, so that a step stays the same."""
    whole = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for rows in _halves(args.per_device_train_batch_size):
        times = -(-whole // rows)
        yield (f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {times}",
               replace(args, per_device_train_batch_size=rows, gradient_accumulation_steps=times))


def _halves(value: int, least: int = 1) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def more_devices(peak: Callable[[str, int], float], strategy: str, devices: int, limit: float, parted: bool = True,
                 ) -> tuple[str, int] | None:
    """The fewest devices, and the strategy, whose peak fits; None where none up to 64 does.

    Args:
        parted: whether weights can be parted; else processes share out the state of a mask's optimiser at most.
    """
    names = [strategy] if strategy in ("fsdp2", "zero2", "zero3") else ["fsdp2"]
    for name in dict.fromkeys((*names, "fsdp2")) if parted else ("ddp",):
        count = max(2, devices if name != strategy else devices * 2)
        while count <= _MOST:
            if peak(name, count) <= limit:
                return name, count
            count *= 2
    return None
