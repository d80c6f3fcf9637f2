"""Processes that find the launcher's variables, forked from the test: torchrun without a further start of Python and torch.

What the test has patched is patched in them too. A process that fails ends the others, as torchrun does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

#: Exit code of an act that raised something else than SystemExit.
RAISED = 70


def launched(act: Callable[[int], object], n: int = 2) -> tuple[list[int], list[str]]:
    """Run ``act(rank)`` in ``n`` processes; returns exit codes (negative: the signal) and what each said, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(n)]
        running = {_forked(act, rank, n, port, file): rank for rank, file in enumerate(files)}
        codes = [0] * n
        while running:
            time.sleep(0.02)
            for pid, rank in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                del running[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
                for other in running if codes[rank] else ():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGTERM)
        return codes, [file.read_text(errors="replace") for file in files]


def _forked(act: Callable[[int], object], rank: int, n: int, port: int, file: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = RAISED
    try:
        out = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        # pytest has put its own in their place
        sys.stdout, sys.stderr = (os.fdopen(os.dup(out), "w", buffering=1) for _ in range(2))
        logging.getLogger().handlers.clear()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        import torch

        # OpenMP's threads do not live on in a fork; with one there are none
        torch.set_num_threads(1)
        act(rank)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
