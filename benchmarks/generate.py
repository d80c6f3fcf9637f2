"""Race: answers from our back ends against the pipeline, lm-eval and generate_batch.

    python benchmarks/generate.py --json race.json                                 # the embedded model, 200 prompts, CPU
    python benchmarks/generate.py --device cuda --shape 7b --json race.json        # Llama-2-7B shapes, batch 1 and 32
    python benchmarks/generate.py --device cuda --shape 7b-moe --json race.json    # with three experts, top-2, rank 8
    python benchmarks/generate.py --growth growth.json                             # tokens/s by batch 1 to 64; growth.png

Greedy, 64 new tokens at most, prompts of the embedded test sets. Ours: the back ends hf (what --backend auto takes), static
and continuous, as inference.py uses them. Against them, on the same model object with transformers' own attention:

- pipeline: transformers' text-generation pipeline, one prompt at a time;
- lm-eval: its ``hf`` model's generate_until; on a GPU with the batch that its ``auto`` finds, on a CPU with ours;
- generate_batch: transformers' continuous batching, on a GPU with its own settings.

Loading is not timed, and one run before the clock starts is not either (on a CPU of the first batch alone). Sides take
turns, ``--pairs`` rounds; medians of the seconds, and of the ratios of each round. Texts are compared with hf's: in float32,
the default on a CPU, all of them have to be the same; in bfloat16 rows of another batch round elsewhere: the share is told.
Peak: memory beyond what was there before the call, most of the rounds. Limit: batch x bandwidth / (weights + keys and
values), or the speed of a GEMM where products take longer, both measured in this run; prompts are not in it.
Bars: >= 5 x the pipeline, >= 1.2 x lm-eval, on a GPU >= 1 x generate_batch, and >= 60 % of the limit at batch 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Peer -> (least ratio of its time to ours, only on a GPU).
BARS = {"pipeline": (5.0, False), "lm-eval": (1.2, False), "generate_batch": (1.0, True)}
OF_LIMIT = 0.6
BATCHES = {"embedded": (32,), "7b": (1, 32), "7b-moe": (1, 32)}
PROMPTS = {"embedded": 200, "7b": 64, "7b-moe": 64}
GROWTH = (1, 2, 4, 8, 16, 32, 64)


def race(sides: dict[str, Callable[[], list[str]]], rounds: int, device: str,
         failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Run the sides in turn: seconds of every round, texts, most memory.

    Args:
        failed: name -> why, of sides that cannot run here; they are left out.
    """
    from generate_sides import peak_above

    found: dict[str, dict[str, Any]] = {name: {"all": [], "peak_bytes": 0} for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            if name in failed:
                continue
            start = time.perf_counter()
            with or_left_out(name, failed):
                texts, peak = peak_above(side, device)
            if name in failed:
                found.pop(name)
                continue
            found[name]["all"].append(time.perf_counter() - start)
            found[name]["texts"] = texts
            found[name]["peak_bytes"] = max(peak, found[name]["peak_bytes"])
            print(f"round {number + 1}: {name} {found[name]['all'][-1]:.1f} s", file=sys.stderr, flush=True)
    return found


@contextlib.contextmanager
def or_left_out(name: str, failed: dict[str, str]) -> Iterator[None]:
    """A side that cannot run here loses; what it raises is its libraries' affair. Without hf there is no race."""
    try:
        yield
    except Exception as error:
        if name == "hf":
            raise
        traceback.print_exc()
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per batch size and side, and what holds for all of them."""
    import generate_sides as sides
    from moe_sides import limits

    loaded = sides.opened(args)
    gemm, bandwidth = limits(loaded.model.dtype, loaded.device.type)
    facts = facts_of(args, loaded, gemm, bandwidth)
    made = []
    for batch in args.batches:
        # one row at a time takes as long as 32 rows: fewer prompts
        texts = sides.prompts(loaded, min(args.prompts, args.most * batch))
        few = texts if args.device == "cuda" else texts[:batch]
        run: dict[str, Callable[[], list[str]]] = {}
        failed: dict[str, str] = {}
        for name in args.sides:
            with or_left_out(name, failed):
                side = _sides(loaded, texts, name, batch, args.new)
                # what a back end compiles belongs to its own object, so on a GPU it is the one of the race
                (side if args.device == "cuda" else _sides(loaded, few, name, batch, args.new))()
                run[name] = side
        found = race(run, args.pairs, args.device, failed)
        ours = found["hf"]
        tokens = sides.new_tokens(loaded, ours["texts"], args.new)
        most = sides.limit(loaded, texts, batch, args.new, gemm, bandwidth)
        for name, side in found.items():
            same = sum(a == b for a, b in zip(side["texts"], ours["texts"], strict=True))
            bar, gpu = BARS.get(name, (None, False))
            seconds = statistics.median(side["all"])
            made.append({
                "batch": batch, "side": name, "seconds": seconds, "all": side["all"], "tokens_per_second": tokens / seconds,
                "hf_is_faster": statistics.median(a / b for a, b in zip(side["all"], ours["all"], strict=True)),
                "bar": bar if args.device == "cuda" or not gpu else None, "prompts": len(texts), "tokens": tokens,
                "same_text": same, "peak_bytes": side["peak_bytes"], "limit_tokens_per_second": most,
                "of_limit": tokens / seconds / most})
        made += [{"batch": batch, "side": name, "error": why} for name, why in failed.items()]
        facts["outputs_equal"] = all(row["same_text"] == row["prompts"] for row in made if "error" not in row)
        # what was measured survives what comes after
        if args.json:
            args.json.write_text(json.dumps(facts | {"rows": made}, indent=2) + "\n")
    return made, facts


def _sides(loaded: Any, texts: list[str], name: str, batch: int, new: int) -> Callable[[], list[str]]:
    import generate_sides as sides

    if name == "pipeline":
        return sides.one_by_one(loaded, texts, new)
    if name == "lm-eval":
        return sides.lm_eval(loaded, texts, batch, new)
    return (sides.generate_batch(loaded, texts, batch, new) if name == "generate_batch" else
            sides.ours(loaded, texts, name, batch, new))


def facts_of(args: argparse.Namespace, loaded: Any, gemm: float, bandwidth: float) -> dict[str, Any]:
    import torch

    return {"device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads",
            "dtype": str(loaded.model.dtype).removeprefix("torch."), "shape": args.shape, "new": args.new,
            "pairs": args.pairs, "gemm_flops": gemm, "bytes_per_second": bandwidth,
            "parameters": sum(p.numel() for p in loaded.model.parameters())}


def table(found: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| batch | side | s | tokens/s | hf is x faster | bar | same text | peak MB | of limit |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['batch']} | {row['side']} | failed: {row['error']} | | | | | | |")
            continue
        lines.append(f"| {row['batch']} | {row['side']} | {row['seconds']:.2f} | {row['tokens_per_second']:.0f} | "
                     f"{row['hf_is_faster']:.2f} | {row['bar'] or ''} | {row['same_text']} of {row['prompts']} | "
                     f"{row['peak_bytes'] / 1e6:.0f} | {row['of_limit']:.0%} |")
    told = (f"{facts['device']}, {facts['dtype']}, {facts['shape']} ({facts['parameters'] / 1e6:.0f} M weights), "
            f"{facts['new']} new tokens, {facts['pairs']} rounds; GEMM {facts['gemm_flops'] / 1e12:.2f} TFLOP/s, "
            f"{facts['bytes_per_second'] / 1e9:.0f} GB/s; bar of the limit at batch 1: {OF_LIMIT:.0%}")
    return "\n".join([told, "", *lines])


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of our back ends by batch size, one batch each, beside the limit; slopes of both."""
    import math

    import generate_sides as sides
    from moe_sides import limits

    loaded = sides.opened(args)
    gemm, bandwidth = limits(loaded.model.dtype, loaded.device.type)
    # the same lengths at every size
    [text] = sides.prompts(loaded, 1)
    points = []
    for batch in GROWTH:
        texts = [text] * batch
        run = {name: sides.ours(loaded, texts, name, batch, args.new) for name in args.sides if name in sides.OURS}
        for side in run.values():
            side()
        found = race(run, args.pairs, args.device, {})
        tokens = sides.new_tokens(loaded, found["hf"]["texts"], args.new)
        points.append({"batch": batch, **{name: tokens / statistics.median(side["all"]) for name, side in found.items()},
                       "limit": sides.limit(loaded, texts, batch, args.new, gemm, bandwidth)})
    first, last = points[0], points[-1]
    slopes = {name: math.log(last[name] / first[name]) / math.log(last["batch"] / first["batch"])
              for name in last if name != "batch"}
    return facts_of(args, loaded, gemm, bandwidth) | {"points": points, "slopes": slopes}


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a second over the batch size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, slope in found["slopes"].items():
        panel.loglog([p["batch"] for p in found["points"]], [p[name] for p in found["points"]],
                     ":" if name == "limit" else "o-", label=f"{name}, slope {slope:.2f}")
    panel.set(xlabel="rows at a time", ylabel="new tokens/s", title=f"{found['device']}, {found['shape']}, {found['dtype']}")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="", help="default: float32, on cuda bfloat16")
    parser.add_argument("--shape", choices=tuple(BATCHES), default="embedded", help="7b, 7b-moe: random weights")
    parser.add_argument("--model", default="embedded", help="another model for --shape embedded: a folder or a hub name")
    parser.add_argument("--prompts", type=int, default=0,
                        help="default: 200, at 7b shapes 64; of each size at most --most batches")
    parser.add_argument("--most", type=int, default=8, help="batches of a size at most (default: 8)")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most (default: 64)")
    parser.add_argument("--batches", default="", help="rows at a time, e.g. 1,32 (default: 32; at 7b shapes 1,32)")
    parser.add_argument("--sides", default="", help="some of: hf, static, continuous, pipeline, lm-eval, generate_batch; hf "
                                                    "always (default: all)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which every side has its turn (default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=None, help="where the race goes as JSON")
    parser.add_argument("--growth", type=Path, default=None, help="measure growth instead; JSON here, the picture beside it")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.prompts = args.prompts or PROMPTS[args.shape]
    args.batches = [int(n) for n in args.batches.split(",")] if args.batches else BATCHES[args.shape]
    known = ("hf", "static", "continuous", *BARS)
    if odd := set(filter(None, args.sides.split(","))) - set(known):
        parser.error(f"--sides {','.join(sorted(odd))}: no such side; allowed: {', '.join(known)}")
    args.sides = [name for name in known if not args.sides or name in ("hf", *args.sides.split(","))]
    if min(args.pairs, args.threads, args.prompts, args.most, args.new, *args.batches) < 1:
        parser.error("--pairs, --threads, --prompts, --most, --new, --batches must be at least 1")
    from runtime import short_waits

    short_waits()  # as the commands do
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible here; leave the flag out")
    torch.set_num_threads(args.threads)
    if args.growth:
        found = growth(args)
        args.growth.write_text(json.dumps(found, indent=2) + "\n")
        plot(found, args.growth.with_suffix(".png"))
        print(*(f"{name} {slope:.2f}" for name, slope in found["slopes"].items()))
        return
    print(table(*rows(args)))


if __name__ == "__main__":
    main()
