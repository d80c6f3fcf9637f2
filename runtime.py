"""What a command sets for its process before torch is imported: how threads wait, what is kept when it is freed."""

from __future__ import annotations

import gc
import os

#: Objects made and not freed before Python looks for cycles among them; its own 700 is for small programs.
_YOUNG = 20_000


def collect_rarely() -> None:
    """Let Python look for cycles of dead objects a thirtieth as often.

    Importing torch, transformers and PEFT makes some million objects that stay, and looking through them again and again was
    a fifth of a command's start. Tensors do not wait for it: no training step leaves a cycle that holds one
    (tests/benchmarks/test_memory.py).
    """
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


def short_waits() -> None:
    """Let OpenMP threads that wait spin for microseconds, then sleep. Read when torch is imported, so call it before.

    Without end (the runtime's default) two processes on the same cores take twice as long; not at all ("passive") steps of
    many small operations take a third longer. An OMP_WAIT_POLICY that the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # for runtimes other than GNU's
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step instead of giving it back to the kernel; False without glibc.

    A training step takes and frees the same large blocks again and again, and the kernel clears every page of them each
    time: half of a step of DPO or of a mask. Settings of the user (MALLOC_...) stay. Not for commands that promise a limit
    of memory.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    names = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**30), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}  # malloc.h; -1: never trim
    return all([mallopt(*option) == 1 for name, option in names.items() if name not in os.environ])
