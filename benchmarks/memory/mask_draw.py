"""A mask at Llama-2-7B shapes, without the model's passes: kernels, waits, time and memory of draw, gradient and step.

    python -m benchmarks.memory.mask_draw --device cuda                     # a minute on a GPU of 80 GB
    python -m benchmarks.memory.mask_draw --device cuda --granularities row
    python -m benchmarks.memory.mask_draw --device cpu --shape pico         # operators instead of kernels, small

Every weight of every layer is masked: live weights, base and task vectors in bfloat16, logits in --logit_dtype. Gradients
of the weights are made up and arrive tensor by tensor, as a backward pass sends them; the step is the optimiser's that such
logits train with. ``kernels`` is what a GPU runs, ``operations`` the same without Triton. As many layers as fit are built,
at most 32; memory is the allocator's highest point beside ``models/mask/memory.py``'s plan of the same tensors, and what
that plan says of all 32.

Counted are kernels (on a CPU: operators) for each tensor, and the times that the host waited for a number of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

#: Shape -> hidden, FFN, layers.
SHAPES = {"7b": (4096, 11008, 32), "pico": (64, 160, 2)}
PATHS = ("kernels", "operations")
#: Share of a device's memory that is filled; the rest is for what comes and goes.
_FILLED = 0.9


def tensors(shape: str, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, shape) of the masked weights."""
    hidden, ffn, _ = SHAPES[shape]
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield from ((f"model.layers.{layer}.mlp.{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
        yield f"model.layers.{layer}.mlp.down_proj.weight", (hidden, ffn)


def specs_of(shape: str, layers: int, granularity: str) -> list[Any]:
    from models.mask.slots import Spec
    from models.mask.units import units_of

    return [Spec(name, name, "weight", size, units_of(name, size, granularity, 64, {"head_dim": 128}))
            for name, size in tensors(shape, layers)]


def plan_of(specs: Sequence[Any], logit: int) -> Any:
    """``memory_plan`` of these tensors alone: no frozen weights beside them."""
    from models.mask.memory import memory_plan
    from models.mask.settings import Rule

    return memory_plan(specs, Rule(), 1, 2, logit, 0, 2)


def bank_of(specs: Sequence[Any], settings: Any, logit_dtype: Any, device: Any) -> Any:
    """A bank over random weights and task vectors in bfloat16, made on the device."""
    import torch

    from models.mask.bank import MaskBank
    from models.mask.live import Slot

    torch.manual_seed(0)
    slots = []
    for spec in specs:
        base, delta = (torch.empty(spec.shape, dtype=torch.bfloat16, device=device).normal_(0, scale)
                       for scale in (0.02, 2e-3))
        slots.append(Slot(spec, torch.nn.Parameter(torch.empty_like(base)), base, [delta], None))
    bank = MaskBank(slots, settings, logit_dtype=logit_dtype)
    bank.attach()
    return bank


def measured(args: argparse.Namespace, granularity: str, path: str) -> dict[str, Any]:
    """A row: kernels and waits for each tensor, seconds, bytes; on the device of ``args``."""
    import torch

    from models.mask.bank import Draw
    from models.mask.optimiser import RoundedAdamW
    from models.mask.settings import Settings

    device, logit_dtype = torch.device(args.device), getattr(torch, args.logit_dtype)
    most = args.layers or SHAPES[args.shape][2]
    layers = most
    if device.type == "cuda":
        one = plan_of(specs_of(args.shape, 1, granularity), logit_dtype.itemsize)
        room = torch.cuda.mem_get_info()[0] * _FILLED - one.passing
        layers = max(1, min(most, int(room / sum(one.held.values()))))
    specs = specs_of(args.shape, layers, granularity)
    bank = bank_of(specs, Settings(granularity=granularity), logit_dtype, device)
    kind = RoundedAdamW if logit_dtype == torch.bfloat16 else torch.optim.AdamW
    adam = kind(bank.parameters(), lr=5e-3)

    def draw(step: int) -> None:
        bank.write(Draw(f"race|{step}"))

    def gradient(step: int) -> None:
        for slot in reversed(bank.masked):
            slot.live.backward(torch.full_like(slot.live, 1e-4))
        bank.finish()

    def move(step: int) -> None:
        adam.step()
        adam.zero_grad()

    parts = {"draw": draw, "gradient": gradient, "step": move}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with _only(path):
        for step in range(args.steps + 1):
            for name, part in parts.items():
                seconds[name].append(_timed(part, step, device))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        counts = {name: _counted(part, args.steps + 1, device) for name, part in parts.items()}
    plan, whole = (plan_of(some, logit_dtype.itemsize) for some in (specs, specs_of(args.shape, most, granularity)))
    return {
        "granularity": granularity, "path": path, "layers": layers, "tensors": len(specs), "masked": plan.masked,
        # the first step compiles and makes the moments
        "seconds": {name: statistics.median(times[1:]) for name, times in seconds.items()},
        "kernels": {name: count["kernels"] / len(specs) for name, count in counts.items()},
        "waits": {name: count["waits"] / len(specs) for name, count in counts.items()},
        "peak": peak, "plan": plan.total, "plan_whole": whole.total}


@contextlib.contextmanager
def _only(path: str) -> Iterator[None]:
    """Nothing by kernels for ``operations``."""
    if path == "kernels":
        yield
        return
    with patch("models.mask.fused.launch.FusedDraws.serves", lambda *_: False), patch(
            "models.mask.optimiser.adam_serves", lambda *_: False):
        yield


def _timed(part: Callable[[int], None], step: int, device: Any) -> float:
    _wait(device)
    start = time.perf_counter()
    part(step)
    _wait(device)
    return time.perf_counter() - start


def _counted(part: Callable[[int], None], step: int, device: Any) -> dict[str, int]:
    """Kernels (on a CPU: operators that are no part of others) and waits of a part."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        part(step)
        _wait(device)
    if not cuda:
        return {"kernels": sum(event.name.startswith("aten::") and not _within(event) for event in seen.events()),
                "waits": sum(event.name == "aten::item" for event in seen.events())}
    on_device = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
    # of the rest the optimiser's are names of spans
    return {"kernels": sum(not name.startswith(("Memcpy", "Memset", "Optimizer")) for name in on_device),
            "waits": sum(name.startswith("Memcpy DtoH") for name in on_device)}


def _within(event: Any) -> bool:
    """Whether an operator is a part of another one."""
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")


def _wait(device: Any) -> None:
    if device.type == "cuda":
        sys.modules["torch"].cuda.synchronize()


def table(rows: Sequence[dict[str, Any]], device: str) -> str:
    """The rows for a person; GB are 1e9 bytes."""
    called = "kernels" if device == "cuda" else "operators"
    heads = ["logits", "by", "layers", f"{called} a tensor: draw", "gradient", "step", "waits a tensor", "draw ms",
             "gradient ms", "step ms", "peak GB", "plan GB", "bytes an entry", "plan of all layers GB"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        peak = row["peak"]
        lines.append([
            row["granularity"], row["path"], str(row["layers"]), *(f"{n:.1f}" for n in row["kernels"].values()),
            f"{sum(row['waits'].values()):.1f}", *(f"{s * 1e3:.1f}" for s in row["seconds"].values()),
            f"{peak / 1e9:.2f}" if peak else "", f"{row['plan'] / 1e9:.2f}", f"{peak / row['masked']:.2f}" if peak else "",
            f"{row['plan_whole'] / 1e9:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(args: argparse.Namespace, granularity: str, path: str) -> dict[str, Any]:
    """A row; on a GPU of a process of its own, whose end frees all that it held."""
    if args.device == "cpu":
        return measured(args, granularity, path)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, args, granularity, path).result()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=0, help="at most so many; 0: the shape's")
    parser.add_argument("--granularities", default="element,row", help="commas: element, row, block, head, layer")
    parser.add_argument("--paths", default=",".join(PATHS), help=f"commas: {', '.join(PATHS)}")
    parser.add_argument("--logit_dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one that compiles")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args(argv)
    granularities, paths = args.granularities.split(","), args.paths.split(",")
    if set(granularities) - {"element", "row", "block", "head", "layer"} or set(paths) - set(PATHS) or args.steps < 1:
        parser.error(f"--granularities element, row, block, head, layer; --paths {', '.join(PATHS)}; --steps 1 or more")
    rows = []
    for granularity in granularities:
        for path in paths:
            rows.append(_row(args, granularity, path))
            print(table(rows[-1:], args.device).splitlines()[-1], flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(rows, args.device)}")


if __name__ == "__main__":
    main()
