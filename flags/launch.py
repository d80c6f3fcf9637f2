"""What a launcher (torchrun, accelerate launch) told this process about its neighbours. Environment only, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: How to start a command on several devices, for messages.
LAUNCH = "accelerate launch --config_file scripts/accelerate/{} --num_processes {} align_basemodel.py .."
#: Of --fsdp_config, with their prefix taken off: what is read here, beside "version".
_READ = ("reshard_after_forward", "cpu_offload", "offload_params")


@dataclass(frozen=True)
class Sharding:
    """FSDP2: every process holds a part of each weight, its gradient and its optimiser state.

    Args:
        reshard_after_forward: let go of a layer's other parts behind its forward pass too (ZeRO-3), not only behind its
            backward pass (ZeRO-2).
        cpu_offload: keep the parts in the host's memory.
    """

    reshard_after_forward: bool = True
    cpu_offload: bool = False


def processes() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or processes()


def sharding(training: Mapping[str, Any]) -> Sharding | None:
    """FSDP2 as accelerate's configuration file or --fsdp asks for it; None: every process holds the whole model."""
    if _asks(training):
        config = _fsdp_config(training)
        return Sharding(_true(config.get("reshard_after_forward", True)),
                        _true(config.get("cpu_offload", config.get("offload_params", False))))
    if not _true(os.environ.get("ACCELERATE_USE_FSDP", "")):
        return None
    return Sharding(_true(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")),
                    _true(os.environ.get("FSDP_OFFLOAD_PARAMS", "")))


def launch_problems(training: Mapping[str, Any]) -> list[str]:
    """What is wrong with the way in which processes shall share a training."""
    found = []
    if _asks(training):
        if "RANK" not in os.environ:
            found.append(f"--fsdp {training['fsdp']}: shards over processes, and there is one; start several: "
                         + LAUNCH.format("fsdp2.yaml", 2))
        try:
            config = _fsdp_config(training)
        except (OSError, ValueError):
            return [*found, f"--fsdp_config {training['fsdp_config']}: no JSON object that can be read; leave it out, or "
                            "use scripts/accelerate/fsdp2.yaml"]
        if (version := str(config.get("version", 2))) != "2":
            found.append(f"--fsdp_config: version {version} is not served; leave it out for FSDP2")
        if odd := sorted(set(config) - {*_READ, "version"}):
            found.append(f"--fsdp_config: {', '.join(odd)} not read; allowed: {', '.join(_READ)}; layers are parted by the "
                         "model's own list, and --gradient_checkpointing is a flag of its own")
    elif _true(os.environ.get("ACCELERATE_USE_FSDP", "")):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            found.append(f"accelerate's configuration: fsdp_version {version} is not served; use --config_file scripts/"
                         "accelerate/fsdp2.yaml (fsdp_version: 2)")
        if _true(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "")):
            found.append("accelerate's configuration: fsdp_activation_checkpointing is not read; set it to false and add "
                         "--gradient_checkpointing true")
    deep = "--deepspeed" if training.get("deepspeed") else "accelerate's configuration: distributed_type DEEPSPEED"
    if (training.get("deepspeed") or _true(os.environ.get("ACCELERATE_USE_DEEPSPEED", ""))) and not find_spec("deepspeed"):
        found.append(f"{deep}: the package deepspeed is not installed; run pip install deepspeed on a machine with a CUDA "
                     "compiler, or use --config_file scripts/accelerate/fsdp2.yaml, which shards as ZeRO-3 does")
    return found


def _fsdp_config(training: Mapping[str, Any]) -> dict[str, Any]:
    given = training.get("fsdp_config") or {}
    content = given if isinstance(given, Mapping) else json.loads(
        given if str(given).lstrip().startswith("{") else Path(given).expanduser().read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError("no object")
    return {key.removeprefix("fsdp_"): value for key, value in content.items()}


def _asks(training: Mapping[str, Any]) -> bool:
    # bare, it is true; earlier versions of transformers took names of strategies
    return str(training.get("fsdp") or "").lower() not in ("", "false", "0", "no")


def _true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes")
