"""Where a command computes: threads, seed, device, and the dtype that the hardware multiplies in."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from errors import UserError


def set_up_torch(args: Any) -> tuple[torch.device, torch.dtype]:
    """Threads, seed, device and compute dtype of a command; returns (device, dtype)."""
    # not os.cpu_count(): that counts cores on which this process may not run
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(args.seed)
    # bars of weight loading would stand between the lines of a log
    hf_logging.disable_progress_bar()
    device = _device(args)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or install the CUDA build of torch")
    return device, compute_dtype(args.dtype, device)


def resolved_dtype(args: Any) -> str:
    """The name of the dtype that --dtype stands for on this machine: what identifies answers and scores records it."""
    return str(compute_dtype(args.dtype, _device(args))).removeprefix("torch.")


def _device(args: Any) -> torch.device:
    return torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else
                        "cpu" if args.device == "auto" else args.device)


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
