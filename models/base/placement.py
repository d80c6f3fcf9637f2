"""Where a command computes: threads, seed, device, and the dtype that the hardware multiplies in."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from errors import UserError
from flags.launch import local_processes, local_rank, processes


def set_up_torch(args: Any) -> tuple[torch.device, torch.dtype]:
    """Threads, seed, device and compute dtype of a command; returns (device, dtype)."""
    # not os.cpu_count(): that counts cores on which this process may not run; neighbours on the machine share them
    torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) // local_processes()))
    torch.manual_seed(args.seed)
    # bars of weight loading would stand between the lines of a log
    hf_logging.disable_progress_bar()
    device = _device(args)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or install the CUDA build of torch")
    if device.index is not None:
        # asked before anything is loaded: a bare "cuda" is device 0, and every process would fill that one
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{local_processes()} processes were started on this machine, and torch sees "
                            f"{torch.cuda.device_count()} CUDA devices; start one for each (--num_processes of accelerate "
                            "launch, --nproc_per_node of torchrun)")
        torch.cuda.set_device(device)
    return device, compute_dtype(args.dtype, device)


def resolved_dtype(args: Any) -> str:
    """The name of the dtype that --dtype stands for on this machine: what identifies answers and scores records it."""
    return str(compute_dtype(args.dtype, _device(args))).removeprefix("torch.")


def _device(args: Any) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    # one device for each process of a launcher; without one the first that is visible
    return torch.device(kind, local_rank()) if kind == "cuda" and processes() > 1 else torch.device(kind)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the hardware multiplies in it (AMX or AVX512-BF16 on a CPU), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # fp16 is what devices without bfloat16 multiply in
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # asked, never assumed: without these units bfloat16 is emulated; with them four times fp32 (docs/lab-log.md)
    abilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else torch.float32
