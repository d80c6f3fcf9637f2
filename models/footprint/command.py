"""--plan: what a command would hold, told line by line. Nothing is loaded and nothing is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifest
from config import Parsed
from errors import UserError
from flags import (
    AlignArgs,
    EvaluateArgs,
    ExtractArgs,
    FuseAdaptersArgs,
    FuseMoeArgs,
    InferenceArgs,
    MaskArgs,
)
from flags.align import Objective
from flags.export import ImportArgs
from flags.realign import RealignArgs
from models.footprint import answering, fusing, training
from models.footprint.fitting import more_devices, smaller
from models.footprint.shapes import Shape, counted, of_skeleton, shape_of
from models.footprint.strategies import TABLE, Footprint, divided
from models.footprint.training import Place

_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Commands that fuse files on the CPU, in fp32.
_FILES = (ExtractArgs, FuseAdaptersArgs, ImportArgs, RealignArgs)


def told(parsed: Parsed) -> Iterator[str]:
    """The plan of a command line, line by line.

    Raises:
        UserError: the size of the base is not known; or, after the last line, that it does not fit, with the nearest setting
            that does.
    """
    if not manifest.is_main():
        return
    args, asked, trains = parsed.args, parsed.plan, isinstance(parsed.args, AlignArgs)
    mine = per_device(parsed)
    if mine is None:
        yield "plan: no model is loaded; answers are read as text"
        return
    (strategy, devices), (place, dtype), shape = _divided_by(parsed), _place(args, asked), _shape(args)
    counted = (f"{mine.parameters / 1e9:.3f}e9 parameters" if mine.parameters else
               "the adapters are not there yet and count nothing")
    yield (f"plan: {counted}" + (f", {mine.trained / 1e6:,.2f}e6 train" if trains else "")
           + f"; {TABLE[strategy].called}{f' on {devices} devices' if devices > 1 else ''}, "
           f"{'cuda' if place.cuda else 'cpu'}, {dtype}{_batch(args, asked.plan_tokens)}")
    yield from (f"  {name:24}{size / 1e9:9.3f} GB" for name, size in mine.parts().items() if size)
    yield f"  {'peak of each device':24}{mine.peak / 1e9:9.3f} GB"
    if launch := TABLE[strategy].launch:
        yield f"start: {launch.format(devices=devices)} align_basemodel.py .."
    limit, found = (asked.plan_gb * 1e9, "--plan_gb") if asked.plan_gb else (_memory(place.cuda, devices), "found here")
    if not limit:
        yield (f"whether that fits is not known: no {'GPU' if place.cuda else 'memory'} is found here; name it with "
               "--plan_gb N")
        return
    if mine.peak <= limit:
        yield f"fits {limit / 1e9:.1f} GB ({found})"
        return

    def peak(one: Any, extra: Any, name: str = strategy, count: int = devices) -> float:
        whole = footprint(one, extra, shape, place, _tokens(one, args, asked))
        return 0.0 if whole is None else divided(whole, name, count).peak

    raise UserError(f"--plan: {mine.peak / 1e9:.1f} GB of each device, and {limit / 1e9:.1f} GB is there ({found}); "
                    + _nearest(args, parsed.training, place, peak, strategy, devices, limit))


def per_device(parsed: Parsed) -> Footprint | None:
    """What each device holds of a command line with --plan; None where no model is loaded.

    Raises:
        UserError: the size of the base is not known, or the command is not divided.
    """
    strategy, devices = _divided_by(parsed)
    place, _ = _place(parsed.args, parsed.plan)
    whole = footprint(parsed.args, parsed.training, _shape(parsed.args), place, parsed.plan.plan_tokens)
    return whole and divided(whole, strategy, devices)


def _divided_by(parsed: Parsed) -> tuple[str, int]:
    """(strategy, devices) of a command."""
    args, asked = parsed.args, parsed.plan
    if not isinstance(args, AlignArgs):
        if asked.strategy:
            raise UserError(f"--plan_strategy {asked.strategy}: this command runs whole on each device; drop it, and "
                            "--plan_devices with it")
        return "one", 1
    strategy, devices = launched(asked)
    if whole := held_whole(args, strategy):
        if TABLE[strategy].weights and asked.plan_strategy:
            raise UserError(f"--plan_strategy {strategy}: {whole} is held whole by every process; use one, or ddp")
        strategy = "ddp" if TABLE[strategy].weights else strategy
    return strategy, devices


def held_whole(args: Any, strategy: str = "fsdp2") -> str:
    """What of a training a strategy that parts weights leaves whole; empty where it parts all."""
    if isinstance(args, MaskArgs):
        # FSDP2 parts by rows, and TIES' cuts are ranks in all of a task vector (training/mask_model.py)
        across = args.granularity in ("head", "layer", "rank") or args.merge_rule == "ties" and len(args.task_names) > 1
        return "a mask with its model" if across or strategy != "fsdp2" else ""
    bits = getattr(args, "base_quantization", None)
    return f"a base in {bits}" if bits else ""


def _nearest(args: Any, extra: dict[str, Any], place: Place, peak: Any, strategy: str, devices: int, limit: float) -> str:
    """What fits, in words."""
    ways = []
    for words, one, more in smaller(args, extra, place.cuda):
        if (size := peak(one, more)) <= limit:
            ways.append(f"{words} ({size / 1e9:.1f} GB)")
            break
    if isinstance(args, AlignArgs) and (found := more_devices(
            lambda name, count: peak(args, extra, name, count), strategy, devices, limit, not held_whole(args))):
        name, count = found
        ways.append(f"--plan_strategy {name} --plan_devices {count} ({peak(args, extra, name, count) / 1e9:.1f} GB each)")
    return f"nearest that fits: {'; or '.join(ways)}" if ways else "no smaller setting fits; use a smaller base"


def footprint(args: Any, extra: dict[str, Any], shape: Shape, place: Place, tokens: int = 0) -> Footprint | None:
    """What a command holds on one device; None where it loads no model."""
    if isinstance(args, AlignArgs):
        return training.training(args, extra, shape, place, tokens)
    if isinstance(args, InferenceArgs):
        return answering.inference(args, shape, place, tokens)
    if isinstance(args, EvaluateArgs):
        return answering.scoring(args, shape, place)
    if isinstance(args, FuseMoeArgs):
        return answering.building(args, shape, place)
    if isinstance(args, FuseAdaptersArgs):
        return fusing.adapters(args)
    if isinstance(args, RealignArgs):
        rank = (args.rank or 16) if args.output == "adapter" else 0
        return fusing.matrices(args, shape, rank, 1 + len(args.task_names) + bool(args.unaligned) + bool(args.safe))
    if isinstance(args, ExtractArgs):
        return fusing.matrices(args, shape, args.fixed_rank or 16, 2)
    if isinstance(args, ImportArgs):
        return fusing.matrices(args, shape, args.max_rank or 16, 2)
    raise UserError("--plan: this command has no plan of its own; it has --dry_run")


def launched(asked: Any) -> tuple[str, int]:
    """(strategy, devices) that are asked for, else what accelerate's launcher set up, else one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = "one" if processes == 1 else "ddp"
    if processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        found = "fsdp2"
    elif processes > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        found = f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    strategy = asked.strategy or (found if found in TABLE else "zero2")
    devices = asked.plan_devices or processes
    if strategy != "one" and devices == 1:
        raise UserError(f"--plan_strategy {strategy}: over how many devices? add --plan_devices N")
    return strategy, devices if strategy != "one" else 1


def _tokens(one: Any, args: Any, asked: Any) -> int:
    """The rows' length that was named, unless a setting cuts rows below it."""
    cut = getattr(one, "model_max_length", None)
    return min(asked.plan_tokens, cut) if asked.plan_tokens and cut != getattr(args, "model_max_length", None) else (
        asked.plan_tokens)


def _batch(args: Any, tokens: int) -> str:
    if isinstance(args, Objective):
        rows = f"{args.per_device_train_batch_size} row{'s' * (args.per_device_train_batch_size != 1)}"
        return f"; {rows} of {tokens or args.model_max_length} tokens a pass and device"
    if isinstance(args, InferenceArgs):
        return f"; {args.batch_size} prompts of {tokens or answering.PROMPT} tokens and {args.max_new_tokens} new ones"
    return f"; {args.batch_tokens} tokens a pass" if isinstance(args, EvaluateArgs) else ""


def _place(args: Any, asked: Any) -> tuple[Place, str]:
    """Where the command would compute, and the name of its type; torch is asked only where the flags leave it open."""
    if isinstance(args, _FILES):
        return Place(False, 4), "float32"
    device, dtype = args.device, args.dtype
    if device == "auto":
        # a cluster is planned on a laptop: whoever names devices or their memory means GPUs
        elsewhere = asked.plan_gb or asked.plan_devices > 1
        device = "cuda" if elsewhere or Path("/dev/nvidiactl").exists() else "cpu"
    if dtype == "auto" and device == "cuda" and not Path("/dev/nvidiactl").exists():
        dtype = "bfloat16"
    if dtype == "auto":
        import torch

        from models.base.placement import compute_dtype

        dtype = str(compute_dtype(dtype, torch.device(device))).removeprefix("torch.")
    return Place(device == "cuda", _ITEM[dtype]), dtype


def _shape(args: Any) -> Shape:
    """The base's shape: by its config.json, of a family that is not counted there on the meta device, else by its name."""
    base = getattr(args, "model_name_or_path", "embedded") or "embedded"
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file() and not counted(folder):
        return of_skeleton(folder)
    if found := shape_of(base):
        return found
    raise UserError(f"--model_name_or_path {base}: --plan knows a base by its folder or by a name that tells its size "
                    "(.. -7b ..); give a folder with a config.json")


def _memory(cuda: bool, devices: int) -> float:
    """Bytes of a device that is here; of a CPU each process's share of what is free. 0: not known."""
    if cuda:
        if not Path("/dev/nvidiactl").exists():
            return 0.0
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0.0
    try:
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return 0.0
    left = int(free[1]) * 1024.0 if free else 0.0
    try:
        # a container may have less than the machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        left = min(left, float(limit) - float(used)) if limit.isdigit() else left
    except (OSError, ValueError):
        pass
    return left / devices
