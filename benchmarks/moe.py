"""Race: one fused MoE layer against one dense FFN, transformers' back ends for dense experts, and the published loop.

    python benchmarks/moe.py --json race.json                # 2048/5632, 3 experts, top-2, rank 8; 1, 32, 512 tokens
    python benchmarks/moe.py --device cuda --json race.json  # 4096/11008; 1, 16, 512, 4096 tokens
    python benchmarks/moe.py --growth growth.json            # how time grows with tokens, experts, rank, width; growth.png

Ours forward is the layer that answers (``models/moe/packed.py``); ours forward + backward is the layer that trains, rank 8
aligned and rank 8 tuned, gradients of tuned factors, router and input. Beside them:

- one dense FFN of the same widths, the floor; forward + backward with a LoRA of rank 8 on its three matrices;
- transformers' Mixtral experts (three dense experts) with the back ends eager, grouped_mm and batched_mm, each block with a
  configuration of its own. Their weights are frozen and get no gradient, which is kinder to them than tuning would be;
- the published loop: per expert a gather, a dense FFN, a weighted scatter.

Sides take turns, ``--pairs`` rounds after one that does not count; medians. On a GPU a forward pass that can be captured
runs as a CUDA graph, ours and theirs alike. Peak: bytes of tensors made in one call and alive at once, weights not counted.
``outputs_equal``: ours against the router's choice of materialised fp32 experts, 1e-2 in bfloat16, 1e-5 in fp32.
Limit: 6 d f operations per token (twice that with the backward pass) at the speed of a GEMM measured in this run, or the
base's weights read once at the bandwidth measured in this run, whichever takes longer. Bars: docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES = {"cpu": (2048, 5632), "cuda": (4096, 11008)}
TOKENS = {"cpu": (1, 32, 512), "cuda": (1, 16, 512, 4096)}
#: batched_mm copies an expert's weights for each token and choice; above this many bytes it is left out.
COPIES = 8 * 2**30
#: (device, direction) -> (tokens, most time against dense, least time of the best back end against ours).
BARS = {("cpu", "forward"): {1: (1.2, 1.5), 512: (1.35, 1.5)}, ("cpu", "forward+backward"): {512: (1.5, None)},
        ("cuda", "forward"): {1: (1.3, 1.5), 4096: (1.2, 2.0)}, ("cuda", "forward+backward"): {4096: (1.35, None)}}
WEIGHT_BAR = 0.4
GROWTH = {"tokens": (1, 4, 16, 64, 256, 1024, 2048, 8192), "experts": (2, 3, 4, 6, 8, 12), "rank": (4, 8, 16, 32, 64),
          "width": (256, 512, 1024, 2048)}
SIDES = ("ours", "dense", "limit")


def rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The race's rows, and what holds for all of them."""
    import torch
    from moe_sides import (
        BACKENDS,
        backward,
        captured,
        dense_ffn,
        error_of,
        limits,
        make,
        mixtral,
        peak_bytes,
        published_loop,
        race,
    )

    from models.moe.packed import PackedMoe

    dtype, device = getattr(torch, args.dtype), args.device
    size = (args.hidden, args.width, args.experts, args.top_k, args.rank, dtype, device)
    tuned, base = make(*size, tuned=True), make(*size, tuned=False)
    packed = PackedMoe(make(*size, tuned=False))
    blocks = mixtral(base)
    loop = published_loop(blocks["eager"], args.top_k)
    plain, lora = dense_ffn(base), dense_ffn(base, args.rank)
    trained = [p for n, p in tuned.named_parameters() if "tuned_" in n or n == "router"]
    weights = sum(t.nbytes for t in packed.state_dict().values())
    materialised = sum(p.nbytes for p in blocks["eager"].parameters())
    gemm, bandwidth = limits(dtype, device)
    base_bytes = 3 * args.hidden * args.width * dtype.itemsize
    tolerance = 1e-2 if dtype != torch.float32 else 1e-5
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads",
             "dtype": args.dtype, "hidden": args.hidden, "width": args.width, "experts": args.experts, "top_k": args.top_k,
             "rank": args.rank, "pairs": args.pairs, "gemm_flops": gemm, "bytes_per_second": bandwidth,
             "weight_bytes": weights, "materialised_bytes": materialised, "weight_ratio": weights / materialised,
             "weight_bar": WEIGHT_BAR}
    made = []
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden, device=device, dtype=dtype)
        sides = {"ours": packed, "dense": plain[0], "loop": loop,
                 **{name: (lambda x, block=block: block(x[None])[0]) for name, block in blocks.items()}}
        if tokens * args.top_k * base_bytes > COPIES:
            del sides["batched_mm"]
        few = x[:64]
        errors = {"forward": error_of(packed, base, few), "forward+backward": error_of(tuned, base, few)}
        for direction in ("forward", "forward+backward"):
            if direction == "forward":
                calls = {name: functools.partial(side, x) for name, side in sides.items()}
                guard = torch.no_grad()
            elif tokens == 1:
                continue
            else:
                calls = {name: backward(side, (), x) for name, side in sides.items()}
                calls |= {"ours": backward(tuned, trained, x), "dense": backward(*lora, x)}
                guard = torch.enable_grad()
            with guard:
                peaks = {}
                for name, call in list(calls.items()):
                    try:
                        peaks[name] = peak_bytes(call, device)
                    except RuntimeError as error:  # a peer that cannot run here loses; out of memory is such an error too
                        if name in SIDES:
                            raise
                        del calls[name]
                        print(f"{tokens} tokens {direction}: {name} left out: {error}", file=sys.stderr, flush=True)
                if device == "cuda" and direction == "forward":
                    calls = {name: captured(call) for name, call in calls.items()}
                seconds = race(calls, args.pairs, device)
            work = 6 * args.hidden * args.width * tokens * (1 if direction == "forward" else 2)
            limit = max(work / gemm, base_bytes / bandwidth)
            backend = min((name for name in BACKENDS if name in seconds), key=seconds.get)
            row = {"tokens": tokens, "direction": direction, "seconds": seconds, "peak_bytes": peaks,
                   "ours_to_dense": seconds["ours"] / seconds["dense"], "best_backend": backend,
                   "backend_to_ours": seconds[backend] / seconds["ours"],
                   "loop_to_ours": seconds["loop"] / seconds["ours"] if "loop" in seconds else None,
                   "limit_seconds": limit, "of_limit": limit / seconds["ours"], "error": errors[direction],
                   "outputs_equal": errors[direction] <= tolerance}
            most, least = BARS.get((device, direction), {}).get(tokens, (None, None))
            row |= {"bar_to_dense": most, "bar_backend": least}
            made.append(row)
            # what was measured survives what comes after
            if args.json:
                args.json.write_text(json.dumps(facts | {"rows": made}, indent=2) + "\n")
            print(f"{tokens} tokens {direction}: ours {1e3 * seconds['ours']:.2f} ms, dense {1e3 * seconds['dense']:.2f}",
                  file=sys.stderr, flush=True)
    return made, facts


def table(found: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown, times in ms, peaks in MB."""
    from moe_sides import BACKENDS

    names = ("ours", "dense", *BACKENDS, "loop")
    head = ["tokens", "direction", *(f"{name} ms" for name in names), "ours / dense", "bar", "best back end / ours", "bar ",
            "limit ms", "of limit", "peak ours MB", "dense MB", "outputs equal"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        shown = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
        times = [shown(row["seconds"].get(name) and 1e3 * row["seconds"][name], ".2f") for name in names]
        lines.append([str(row["tokens"]), row["direction"], *times, f"{row['ours_to_dense']:.2f}",
                      shown(row["bar_to_dense"], ".2f"), f"{row['backend_to_ours']:.2f}", shown(row["bar_backend"], ".1f"),
                      f"{1e3 * row['limit_seconds']:.2f}", f"{row['of_limit']:.0%}",
                      *(f"{row['peak_bytes'][name] / 1e6:.1f}" for name in ("ours", "dense")),
                      f"{'yes' if row['outputs_equal'] else 'NO'} ({row['error']:.0e})"])
    told = (f"{facts['device']}, {facts['dtype']}, {facts['hidden']}/{facts['width']}, {facts['experts']} experts, "
            f"top-{facts['top_k']}, rank {facts['rank']}, {facts['pairs']} rounds; GEMM {facts['gemm_flops'] / 1e12:.2f} "
            f"TFLOP/s, {facts['bytes_per_second'] / 1e9:.0f} GB/s; weights {facts['weight_bytes'] / 1e6:.0f} MB, "
            f"{facts['weight_ratio']:.2f} of materialised experts (bar {WEIGHT_BAR:g})")
    return "\n".join([told, "", *(f"| {' | '.join(line)} |" for line in lines)])


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Forward time of ours and of one dense FFN along each axis; slopes on doubly logarithmic axes, over its upper half."""
    import torch
    from growth import with_slopes
    from moe_sides import dense_ffn, limits, make, race

    from models.moe.packed import PackedMoe

    dtype, device, axes = getattr(torch, args.dtype), args.device, {}
    gemm, bandwidth = limits(dtype, device)
    middle = {"tokens": 256, "experts": args.experts, "rank": args.rank, "width": args.hidden}
    for axis, places in GROWTH.items():
        points = []
        for place in places:
            at = middle | {axis: place}
            hidden, width = at["width"], round(at["width"] * args.width / args.hidden)
            base = make(hidden, width, at["experts"], args.top_k, at["rank"], dtype, device, tuned=False)
            dense, x = dense_ffn(base)[0], torch.randn(at["tokens"], hidden, device=device, dtype=dtype)
            packed = PackedMoe(make(hidden, width, at["experts"], args.top_k, at["rank"], dtype, device, tuned=False))
            with torch.no_grad():
                calls = {"ours": functools.partial(packed, x), "dense": functools.partial(dense, x)}
                seconds = race(calls, args.pairs, device)
            limit = max(6 * hidden * width * at["tokens"] / gemm, 3 * hidden * width * dtype.itemsize / bandwidth)
            points.append({axis: place, **seconds, "limit": limit})
            print(f"{axis} {place}: ours {1e3 * seconds['ours']:.2f} ms, dense {1e3 * seconds['dense']:.2f}",
                  file=sys.stderr, flush=True)
        axes[axis] = with_slopes(axis, points, SIDES)
    return {"device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads",
            "dtype": args.dtype, "middle": middle, "top_k": args.top_k, "gemm_flops": gemm, "bytes_per_second": bandwidth,
            "axes": axes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"type": int, "default": None}
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hidden", **whole, help="d (default: 2048; on cuda 4096)")
    parser.add_argument("--width", **whole, help="f (default: 5632; on cuda 11008)")
    parser.add_argument("--tokens", default="", help="e.g. 1,32,512 (the default; on cuda 1,16,512,4096)")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which every side has its turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=None, help="where the race goes as JSON")
    parser.add_argument("--growth", type=Path, default=None, help="measure growth instead; JSON here, the picture beside it")
    args = parser.parse_args()
    hidden, width = SHAPES[args.device]
    args.hidden, args.width = args.hidden or hidden, args.width or width
    args.tokens = [int(n) for n in args.tokens.split(",")] if args.tokens else TOKENS[args.device]
    if min(args.pairs, args.threads, *args.tokens) < 1 or not 1 <= args.top_k <= args.experts:
        parser.error("--pairs, --threads, --tokens must be at least 1, --top_k from 1 to --experts")
    from runtime import keep_freed_memory, short_waits

    short_waits()  # as the commands do
    keep_freed_memory()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible here; leave the flag out")
    torch.set_num_threads(args.threads)
    if args.growth:
        found = growth(args)
        args.growth.write_text(json.dumps(found, indent=2) + "\n")
        from growth import plot, told

        plot(found["axes"], {"s": SIDES}, args.growth.with_suffix(".png"))
        print(told(found["axes"]))
        return
    found, facts = rows(args)
    print(table(found, facts))


if __name__ == "__main__":
    main()
