"""One step of every training and of generation at Llama-2-7B shapes: tokens/s, peak memory, share of the limit.

    python -m benchmarks.gpu_check.steps --json steps.json                             # on one GPU
    python -m benchmarks.gpu_check.steps --device cpu --shape pico --json steps.json   # all of it small

Weights are random, made on the device; nothing is fetched or written. Models, losses and trainers are those that
align_basemodel.py and inference.py use, put together as they put them together; only the base does not come from files.
Each part is a process of its own with a time limit, so that one that fails, hangs or runs out of memory is one line.

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
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
PARTS = ("SFT", "DPO", "MoE tuning", "MoE tuning, checkpointing", "mask on factors", "generation", "generation, fused MoE",
         "DPO, embedded lengths", "DPO, embedded lengths, TRL")


def measured(part: str, args: argparse.Namespace, gemm: float, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of a part, measured in this process; peak memory is the device's, on a CPU the process's."""
    import torch

    from benchmarks.gpu_check.parts import MEASURES
    from benchmarks.gpu_check.place import SHAPES, Place
    from benchmarks.made_up import tokenizer

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as results:
        shape = SHAPES[args.shape]
        place = Place(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16, tokenizer(shape.vocabulary),
                      Path(results))
        rows = MEASURES[part](place, gemm, bandwidth)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return [{"part": part, "error": None, "peak_gib": peak / GIB, **row} for row in rows]


def speeds(device: str) -> tuple[float, float]:
    """(operations per second of a large GEMM, bytes per second of a large copy) in the dtype of the parts."""
    import torch

    from benchmarks.moe_sides import limits

    return limits(torch.float32 if device == "cpu" else torch.bfloat16, device)


def apart(function: Callable[..., Any], *words: Any, device: str, limit_s: float) -> Any:
    """What a function returns in a process of its own; for a CPU a fork of this one, which imports nothing again.

    Raises:
        RuntimeError: it raised, ended otherwise, or took longer than its limit; the message is one line.
    """
    # a fork would inherit what a driver was told, and no driver bears that
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, words))
    process.start()
    # the child's end alone is left: its death ends the waiting
    there.close()
    try:
        value, error = here.recv() if here.poll(limit_s) else (None, f"took longer than {limit_s:g} s")
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
    from config import keep_freed_memory

    keep_freed_memory()  # as align_basemodel.py does
    try:
        there.send((function(*words), None))
    except BaseException as error:
        traceback.print_exc()
        there.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("7b", "pico"), default="7b")
    parser.add_argument("--parts", default=";".join(PARTS), help="some of these, ';' between them: %(default)s")
    parser.add_argument("--limit_s", type=float, default=60, help="seconds that a part may take (default: 60)")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    args = parser.parse_args()
    parts = args.parts.split(";")
    if set(parts) - set(PARTS):
        parser.error(f"--parts: of {'; '.join(PARTS)}")
    from config import short_waits

    short_waits()  # as the commands do
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: no GPU is visible here; give --device cpu --shape pico, which runs all of it small",
              file=sys.stderr)
        sys.exit(2)
    if args.device == "cpu":
        # once, for all forks
        import benchmarks.gpu_check.parts  # noqa: F401

    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {len(os.sched_getaffinity(0))} cores"
    found: dict[str, Any] = {"device": name, "shape": args.shape, "rows": []}
    try:
        gemm, bandwidth = apart(speeds, args.device, device=args.device, limit_s=args.limit_s)
        found |= {"gemm_flops": gemm, "bytes_per_second": bandwidth}
    except RuntimeError as error:
        parts = []
        found["rows"].append({"part": "GEMM and bandwidth", "error": str(error)})
    for part in parts:
        try:
            found["rows"] += apart(measured, part, args, gemm, bandwidth, device=args.device, limit_s=args.limit_s)
        except RuntimeError as error:
            found["rows"].append({"part": part, "error": str(error)})
        # what was measured survives what comes after
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        print(part, *(row["error"] or f"{row['tokens_per_second']:.0f} tokens/s" for row in found["rows"]
                      if row["part"] == part), file=sys.stderr, flush=True)
    args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(row["error"] for row in found["rows"]))


if __name__ == "__main__":
    main()
