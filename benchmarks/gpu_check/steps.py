"""One step of every training and of generation at Llama-2-7B shapes: tokens/s, peak memory, share of the limit.

    python -m benchmarks.gpu_check.steps --json steps.json                             # on one GPU
    python -m benchmarks.gpu_check.steps --device cpu --shape pico --json steps.json   # all of it small

Weights are random, made on the device; nothing is fetched or written. Models, losses and trainers are those that
align_basemodel.py and inference.py use, put together as they put them together; only the base does not come from files.
Each part is a process of its own with a time limit, so that one that fails, hangs or runs out of memory is one line. Beside
the peak of each stands what --plan tells of it (benchmarks/gpu_check/memory.py). Where every weight trains or is masked by
element, the shapes are TinyLlama-1.1B's where the card holds no more (80 GB).

SFT and the fused MoE: 8 rows of 300 tokens, half of each an answer, as the preset h3fusion. DPO and masks (on factors of
rank 256 on q and v, as the preset somf_wizardlm): 4 pairs of 100 tokens and two answers of 200, the prompt read once. The
first two steps do not count. Tokens are those that the model reads, or writes when it generates. The race of DPO takes pairs
of the embedded lengths; TRL's own trainer beside it pads them, with the same settings, model and kernels.

Limits, with the speed of a GEMM and the bandwidth measured in the same run (benchmarks/moe_sides.py): training: 4 operations
per weight and token, 4 more in the output head for answer tokens, nothing for what is computed twice; generation: every
step reads the weights and the keys and values so far, after the prompts went through all weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

#: In the order of what is asked first, should the time not do for all.
PARTS = ("SFT", "SFT, checkpointing", "DPO", "MoE tuning", "MoE tuning, checkpointing", "mask on factors", "generation",
         "full tuning, checkpointing", "mask on weights, by row, bf16", "mask on weights, by element", "full tuning",
         "DPO, checkpointing", "generation, fused MoE", "DPO, embedded lengths", "DPO, embedded lengths, TRL",
         "mask on weights, by element, bf16")
#: Parts whose gradients and optimiser are as large as the model, or larger -> GB (1e9 bytes) of a card for them at 7B.
SMALL = {"mask on weights, by element": math.inf, "mask on weights, by element, bf16": 120, "full tuning": math.inf,
         "full tuning, checkpointing": 140}
#: Says torch in a process whose parent asked the driver something.
_FORKED = "re-initialize CUDA in forked subprocess"
#: Fewer seconds are not worth a start.
LEAST = 8.0


def measured(part: str, args: argparse.Namespace, gemm: float, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of a part, measured in this process."""
    import torch

    from benchmarks.gpu_check.parts import MEASURES
    from benchmarks.gpu_check.place import SHAPES, SMALLER, Place
    from benchmarks.made_up import tokenizer

    device = torch.device(args.device)
    room = torch.cuda.get_device_properties(0).total_memory / 1e9 if device.type == "cuda" else 0
    size = SMALLER.get(args.shape, args.shape) if room < SMALL.get(part, 0) else args.shape
    with tempfile.TemporaryDirectory() as results:
        shape = SHAPES[size]
        place = Place(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16, tokenizer(shape.vocabulary),
                      Path(results))
        rows = MEASURES[part](place, gemm, bandwidth)
    return [{"part": part, "shape": size, "error": None, **row} for row in rows]


def speeds(device: str) -> tuple[float, float, str]:
    """(operations per second of a large GEMM, bytes per second of a large copy) in the dtype of the parts; the device."""
    import torch

    from benchmarks.moe_sides import limits

    # asked here: a context of the parent's would lie on the device in every part
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {len(os.sched_getaffinity(0))} cores"
    return *limits(torch.float32 if device == "cpu" else torch.bfloat16, device), name


def versions() -> dict[str, str]:
    """What the figures depend on beside the device; a package that is not there is left out."""
    found = {}
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def apart(function: Callable[..., Any], *words: Any, device: str, limit_s: float, start: str = "") -> Any:
    """What a function returns in a process of its own.

    Args:
        start: how it starts, as ``multiprocessing`` names it; empty: on a CPU a fork of this process, which imports nothing
            again, for a GPU one of a process that has imported all and met no driver, for no driver bears a fork.

    Raises:
        RuntimeError: it raised, ended otherwise, or took longer than its limit; the message is one line.
    """
    context = multiprocessing.get_context(start or ("fork" if device == "cpu" else "forkserver"))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, words))
    process.start()
    # the child's end alone is left: its death ends the waiting
    there.close()
    try:
        value, error = here.recv() if here.poll(limit_s) else (None, f"took longer than {limit_s:.3g} s")
    except EOFError:
        process.join()
        value, error = None, f"its process ended by itself, exit code {process.exitcode} (-9: out of memory?)"
    if error:
        process.kill()
    process.join()
    if error:
        raise RuntimeError(error)
    return value


def _answer(there: Any, function: Callable[..., Any], words: tuple[Any, ...]) -> None:
    from runtime import keep_freed_memory

    keep_freed_memory()  # as align_basemodel.py does
    try:
        there.send((function(*words), None))
    except BaseException as error:
        traceback.print_exc()
        there.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{_where(error)}"))


def _where(error: BaseException) -> str:
    """The last line of this repository that the error went through, for a table that has no room for a traceback."""
    root = Path(__file__).resolve().parents[2]
    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if Path(frame.filename).is_relative_to(root) and "site-packages" not in frame.filename
           and frame.name not in ("_answer", "measured")]
    return f" ({Path(own[-1].filename).relative_to(root)}:{own[-1].lineno})" if own else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("7b", "pico"), default="7b")
    parser.add_argument("--parts", default=";".join(PARTS), help="some of these, ';' between them: %(default)s")
    parser.add_argument("--limit_s", type=float, default=60, help="seconds that a part may take (default: 60)")
    parser.add_argument("--total_s", type=float, default=float("inf"), help="seconds for all of them (default: no limit)")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    args = parser.parse_args()
    parts = args.parts.split(";")
    if set(parts) - set(PARTS):
        parser.error(f"--parts: of {'; '.join(PARTS)}")
    from runtime import short_waits

    short_waits()  # as the commands do
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: no GPU is visible here; give --device cpu --shape pico, which runs all of it small",
              file=sys.stderr)
        sys.exit(2)
    if args.device == "cpu":
        # once, for all forks
        import benchmarks.gpu_check.parts  # noqa: F401
    else:
        # libraries that look for a GPU as they are imported ask NVML, which bears a fork, and not the driver
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.gpu_check.parts"])
    found = run(args, parts)
    sys.exit(any(row["error"] for row in found["rows"]))


def run(args: argparse.Namespace, parts: Sequence[str]) -> dict[str, Any]:
    """Every part's rows, or why it has none; written to ``args.json`` as they come."""
    end, start = time.monotonic() + args.total_s, ""
    found: dict[str, Any] = {"device": args.device, "shape": args.shape, "versions": versions(), "rows": []}

    def one(function: Callable[..., Any], *words: Any) -> Any:
        left = min(args.limit_s, end - time.monotonic())
        if left < LEAST:
            raise RuntimeError(f"not run: the parts before it took the {args.total_s:.0f} s of all")
        return apart(function, *words, device=args.device, limit_s=left, start=start)

    for attempt in ("", "spawn"):
        start = attempt
        try:
            gemm, bandwidth, found["device"] = one(speeds, args.device)
            found |= {"gemm_flops": gemm, "bytes_per_second": bandwidth}
            break
        except RuntimeError as error:
            # a library did ask the driver: then each part imports everything by itself
            if attempt or _FORKED not in str(error):
                found["rows"].append({"part": "GEMM and bandwidth", "error": str(error)})
                # what parts hold is worth knowing without the limits
                gemm = bandwidth = float("inf")
                break
    for part in parts:
        begun = time.monotonic()
        try:
            found["rows"] += one(measured, part, args, gemm, bandwidth)
        except RuntimeError as error:
            found["rows"].append({"part": part, "error": str(error)})
        # what was measured survives what comes after
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{part} [{time.monotonic() - begun:.0f} s]", *(
            row["error"] or f"{row['tokens_per_second']:.0f} tokens/s" for row in found["rows"] if row["part"] == part),
            file=sys.stderr, flush=True)
    args.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
