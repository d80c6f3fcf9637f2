"""Steps as forks of one process that has imported the libraries: a step of half a minute starts ten seconds earlier.

    python -m workflow.warm DOOR models/fuse.py adapters ...
    python -m workflow.warm --around bash scripts/quickstart.sh ...

The first runs a command line as ``python models/fuse.py adapters ...`` does, in a fork of the process that ``started``
started; the second starts that process and then what stands behind it, with the door in $ABF_WARM (scripts/lanes.sh). The
fork gets this process's folder, environment, standard streams and SIGTERM, and gives its exit code. Where nobody listens
behind the door any more, the command line runs as a process of its own.

Linux on a CPU only: CUDA does not survive a fork, and a step of minutes on a card does not wait for imports.
"""

from __future__ import annotations

import argparse
import array
import atexit
import contextlib
import ctypes
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

#: Not config's: whoever waits for a step imports nothing that takes time.
ROOT = Path(__file__).resolve().parents[1]
#: What steps import, the slowest of it: measured by -X importtime over a command of each kind.
LIBRARIES = ("torch", "torch._dynamo", "transformers", "transformers.models.llama.modeling_llama", "transformers.trainer",
             "transformers.generation", "peft", "peft.tuners.lora", "accelerate", "datasets", "trl.trainer.utils",
             "scipy.stats", "scipy.optimize", "sklearn.metrics", "matplotlib.backends.backend_agg", "matplotlib.figure",
             "safetensors.torch")
STREAMS = 3
#: Variable that tells the scripts where the door is.
DOOR = "ABF_WARM"


def possible() -> bool:
    """Whether steps may be forks here: Linux's process handles, and no card that a fork would lose."""
    return hasattr(os, "pidfd_open") and not Path("/proc/driver/nvidia").exists() and not Path("/dev/kfd").exists()


@contextlib.contextmanager
def started(libraries: Sequence[str] = LIBRARIES) -> Iterator[tuple[Path, int]]:
    """Start the process that steps are forked from; it ends when nobody holds its life line any more.

    Args:
        libraries: modules that it imports first.

    Yields:
        the socket that ``run`` connects to, and the life line: a file descriptor that is passed on to what may outlive this
        process and still starts steps.
    """
    with _server(libraries) as (door, life, _):
        yield door, life


@contextlib.contextmanager
def _server(libraries: Sequence[str]) -> Iterator[tuple[Path, int, subprocess.Popen]]:
    with tempfile.TemporaryDirectory(prefix="abf_") as folder:
        door = Path(folder) / "door"
        held, life = os.pipe()
        with socket.socket(socket.AF_UNIX) as listening:
            # bound here: a step that comes before the imports are done waits in line
            listening.bind(str(door))
            listening.listen(64)
            words = (sys.executable, "-m", "workflow.warm", "--serve", str(listening.fileno()), str(held), *libraries)
            process = subprocess.Popen(words, pass_fds=(listening.fileno(), held), stdin=subprocess.DEVNULL, cwd=ROOT,
                                       env={**os.environ, "PYTHONPATH": str(ROOT)})
        os.close(held)
        try:
            yield door, life, process
        finally:
            os.close(life)
            process.wait()


def serve(listening: int, life: int, libraries: Sequence[str]) -> None:
    """Import, then fork a child for each command line that comes in, until life line and children are gone."""
    # Ctrl-C reaches the steps themselves; this process ends with the one that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load(libraries)
    # OpenBLAS' and jemalloc's own threads come back after a fork by themselves
    if threading.active_count() > 1:
        raise RuntimeError(f"a fork would lack the threads of a library: {threading.enumerate()}")
    door = socket.socket(fileno=listening)
    with selectors.DefaultSelector() as waiting:
        waiting.register(door, selectors.EVENT_READ)
        waiting.register(life, selectors.EVENT_READ)
        children: dict[int, tuple[int, socket.socket]] = {}
        open_ = True
        while open_ or children:
            for key, _ in waiting.select():
                if key.fileobj is door:
                    _begin(door, life, waiting, children)
                elif key.fd == life:
                    waiting.unregister(life)
                    waiting.unregister(door)
                    door.close()
                    open_ = False
                elif key.data == "caller":
                    _hear(key.fileobj, waiting, children)
                elif key.fd in children:
                    _end(key.fd, waiting, children)


def _load(libraries: Sequence[str]) -> None:
    """Import them. What one only warns of meanwhile is left out, as console.NOISE leaves it out of a command's lines."""
    logging.disable(logging.WARNING)
    for name in libraries:
        # what is not installed is not imported by a step either
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    logging.disable(logging.NOTSET)


def _begin(door: socket.socket, life: int, waiting: selectors.BaseSelector, children: dict[int, tuple[int, socket.socket]]
           ) -> None:
    caller, _ = door.accept()
    try:
        asked, streams = _receive(caller)
    except (OSError, ValueError):
        caller.close()
        return
    pid = os.fork()
    if pid == 0:
        waiting.close()
        for fd in (door.fileno(), life, caller.fileno(), *children, *(c.fileno() for _, c in children.values())):
            os.close(fd)
        _become(asked, streams)
    for stream in streams:
        os.close(stream)
    handle = os.pidfd_open(pid)
    children[handle] = (pid, caller)
    waiting.register(handle, selectors.EVENT_READ, "child")
    waiting.register(caller, selectors.EVENT_READ, "caller")


def _receive(caller: socket.socket) -> tuple[dict, list[int]]:
    size = array.array("Q", [0])
    first, streams, _, _ = socket.recv_fds(caller, size.itemsize, STREAMS)
    size.frombytes(first)
    body = b""
    while len(body) < size[-1]:
        more = caller.recv(size[-1] - len(body))
        if not more:
            raise ValueError("cut off")
        body += more
    return json.loads(body), streams


def _hear(caller: socket.socket, waiting: selectors.BaseSelector, children: dict[int, tuple[int, socket.socket]]) -> None:
    """A byte asks for the step's end, and so does a caller that is gone."""
    try:
        said = caller.recv(1)
    except OSError:
        said = b""
    for pid, whose in children.values():
        if whose is caller:
            os.kill(pid, signal.SIGTERM)
    if not said:
        waiting.unregister(caller)


def _end(handle: int, waiting: selectors.BaseSelector, children: dict[int, tuple[int, socket.socket]]) -> None:
    pid, caller = children.pop(handle)
    _, status = os.waitpid(pid, 0)
    waiting.unregister(handle)
    os.close(handle)
    with contextlib.suppress(KeyError):
        waiting.unregister(caller)
    with contextlib.suppress(OSError):
        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    caller.close()


def _become(asked: dict, streams: Sequence[int]) -> NoReturn:
    """In the fork: be the command line. Never returns."""
    code = 1
    try:
        # a step does not outlive the process that would tell its end
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_DFL if asked["ignores_sigint"] else signal.default_int_handler)
        for stream, place in zip(streams, range(STREAMS), strict=True):
            os.dup2(stream, place)
            os.close(stream)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = list(asked["words"])
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def run(door: str, words: Sequence[str]) -> int:
    """Run a command line in a fork; its exit code, 128 and the signal's number where a signal ended it."""
    caller = socket.socket(socket.AF_UNIX)
    try:
        caller.connect(door)
    except OSError:
        os.execv(sys.executable, [sys.executable, *words])
    body = json.dumps({"words": list(words), "folder": os.getcwd(), "environment": dict(os.environ),
                       "ignores_sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN}).encode()
    socket.send_fds(caller, [array.array("Q", [len(body)]).tobytes()], range(STREAMS))
    caller.sendall(body)
    # the step hears Ctrl-C itself; this process waits for its end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: caller.send(b"t"))
    try:
        told = caller.recv(16)
    except ConnectionResetError:
        told = b""
    if not told:
        print("error: the process that steps are forked from is gone, and this step with it; run it again", file=sys.stderr)
        return 1
    code = int(told)
    return code if code >= 0 else 128 - code


def around(words: Sequence[str], libraries: Sequence[str] = LIBRARIES) -> int:
    """Run a command while there is a process to fork from, its door in $ABF_WARM (empty where forks cannot be).

    Returns:
        the command's exit code, 128 and the signal's number where a signal ended it.
    """
    with _server(libraries) if possible() else contextlib.nullcontext((None, None, None)) as (door, life, server):
        kept = () if life is None else (life,)
        process = subprocess.Popen(words, env={**os.environ, DOOR: str(door or "")}, pass_fds=kept)

        # Ctrl-C reaches the command itself; this process ends with it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
        # a script that was ended or failed leaves its other lane behind; without the server that is asked to end too
        if server is not None:
            server.terminate()
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run a command in a fork of a process that has imported the libraries.")
    parser.add_argument("--serve", nargs=2, type=int, metavar=("DOOR", "LIFE"),
                        help="be that process: file descriptors of its socket and of its life line; words: what it imports")
    parser.add_argument("--around", action="store_true", help="words: a command that finds that socket in $ABF_WARM")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="DOOR FILE ...",
                        help="the socket, and the command line without python")
    args = parser.parse_args(argv)
    if args.serve:
        serve(*args.serve, args.words)
    elif args.around and args.words:
        sys.exit(around(args.words))
    elif len(args.words) < 2:
        parser.error("needs a socket and a command line")
    else:
        sys.exit(run(args.words[0], args.words[1:]))


if __name__ == "__main__":
    main()
