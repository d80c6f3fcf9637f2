"""Commands in forked processes: torch is loaded once, and a fault or a kill is the child's alone."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from faults.victims import VICTIMS, Place, Victim, make

#: Operations on files, as Python's audit hooks name them; ``open`` counts where it writes.
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree", "open"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Seconds after which a command is taken to hang.
LIMIT = 900
NAMESPACE, PRIVATE, BIND, REMOUNT, READ_ONLY = 0x00020000, 0x44000, 0x1000, 0x20, 0x1


def load() -> None:
    """Import what the commands import, one thread each, so that a fork is a command that has just started."""
    import torch

    torch.set_num_threads(1)
    for name in {victim.module for victim in VICTIMS.values()} | {
            "training.sft", "training.dpo", "training.moe", "training.mask", "training.soup", "models.merging.merge",
            "models.adapters.fuse", "models.export.export", "models.generation.hf", "evaluator.scoring.engine"}:
        importlib.import_module(name)


def made(folder: Path) -> Place:
    """A place, made by a process of its own: torch's threads of a process that computed do not outlive a fork."""
    process = os.fork()
    if not process:
        code = 1
        try:
            make(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert end(process) == 0
    return Place(folder)


def learn(modules: Path) -> None:
    """Import what a child imported while it worked, so that the next need not: half of a pico command's time."""
    for name in modules.read_text().split():
        # a module that only its own caller can import is left to it
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def start(victim: Victim, place: Place, out: Path, log: Path, fault: Callable[[], None] | None = None,
          modules: Path | None = None) -> int:
    """Fork a process that runs the command; its output goes to ``log``. Returns the process' number.

    Args:
        modules: where to write which modules the command imported.
    """
    before = set(sys.modules)
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        words = list(victim.words(place, out))
        sys.argv = [f"{victim.module.replace('.', '/')}.py", *words]
        if fault:
            fault()
        victim.main(words)
        if modules:
            modules.write_text("\n".join(sorted(set(sys.modules) - before)))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # no clean-up of the parent's that was inherited
        os._exit(code)


def end(process: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it.

    Raises:
        AssertionError: it hangs.
    """
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"process {process} hangs")


def run(victim: Victim, place: Place, out: Path, log: Path, fault: Callable[[], None] | None = None) -> int:
    return end(start(victim, place, out, log, fault))


def watching(out: Path, at: int = 0, told: Path | None = None) -> Callable[[], None]:
    """A fault: SIGKILL just before the ``at``-th operation on files of ``out``; 0: none, ``told`` gets their number."""
    def set_up() -> None:
        seen = [0]
        prefix = str(out)

        def hook(event: str, args: tuple) -> None:
            if event not in _EVENTS or not isinstance(args[0], str | os.PathLike):
                return
            if event == "open" and not (args[2] or 0) & _WRITES:
                return
            if not str(args[0]).startswith(prefix):
                return
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if told is not None and not at:
                counter.seek(0)
                counter.write(f"{seen[0]}")
                counter.flush()

        counter = told.open("w") if told is not None else None
        sys.addaudithook(hook)
    return set_up


def jumping(seed: int) -> Callable[[], None]:
    """A fault: at every few looks the wall clock has jumped by years, forwards or back."""
    def set_up() -> None:
        luck, real, state = random.Random(seed), time.time, [0, 0.0]

        def now() -> float:
            state[0] += 1
            if state[0] % 5 == 0:
                state[1] = luck.choice((0.0, 3600.0, -3600.0, 86400.0 * 400, -86400.0 * 3650))
            return real() + state[1]

        time.time = now
        time.time_ns = lambda: int(now() * 1e9)
    return set_up


def starving(at: int) -> Callable[[], None]:
    """A fault: the ``at``-th look into an embedding asks the allocator for more than there is."""
    def set_up() -> None:
        import torch

        real, seen = torch.nn.Embedding.forward, [0]

        def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == at:
                torch.empty(1 << 46, dtype=torch.uint8)
            return real(self, ids)

        torch.nn.Embedding.forward = forward
    return set_up


def mount(source: str, target: Path, kind: str, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def may_mount() -> bool:
    """Whether this process may have mounts of its own, which nobody else sees."""
    return apart(lambda: None) is None


def apart(work: Callable[[], None]) -> str | None:
    """Do ``work`` in a forked process with mounts of its own; None, or what it said when it failed."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(NAMESPACE):
                raise OSError(ctypes.get_errno(), "no mounts of its own are allowed here")
            mount("none", Path("/"), "", PRIVATE)
            work()
        except BaseException:
            os.write(write, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    os.waitpid(process, 0)
    return said or None
