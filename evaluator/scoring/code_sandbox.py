"""Run a program that a model wrote: a process of its own with limits, in an empty folder, no sockets, no writes outside it.

Limits: CPU seconds and wall clock, address space, file size, open files, processes; an audit hook refuses sockets,
subprocesses, ctypes and every change to files outside the folder. That stops accidents and plain tricks. It is no wall
against an attacker: reading files is allowed, and code that walks the interpreter's frames can reach the hook and the
verdict. Hence --allow_code_execution; run strangers' models in a container.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from errors import UserError

PASSED = "passed"
#: Wall-clock seconds beyond the CPU limit: the interpreter's start, and programs that sleep instead of computing.
_GRACE = 3
_FILE_BYTES = 1 << 20

# Runs in the child. The verdict goes out through a descriptor that the program's own prints cannot reach, behind a token
# that no module holds: a program that ends the process early has not passed.
_RUNNER = r"""
import json, os, resource, sys

job = json.loads(sys.stdin.buffer.read())
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
for what, limit in ((resource.RLIMIT_CPU, job["seconds"]), (resource.RLIMIT_AS, job["memory"]),
                    (resource.RLIMIT_FSIZE, job["file_bytes"]), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_NPROC, 0),
                    (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (limit, limit) if hard == resource.RLIM_INFINITY else (min(limit, hard), min(limit, hard)))


def fence():
    # all in a closure of constants: a program that finds this module finds nothing to change
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    prefixes = ("socket.", "subprocess.", "ctypes.", "shutil.", "ftplib.", "http.", "urllib.", "smtplib.", "mmap.")
    events = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
                        "os.killpg", "pty.spawn", "resource.setrlimit", "resource.prlimit", "sys.addaudithook",
                        "signal.pthread_kill"})
    modules = frozenset({"ctypes", "_ctypes", "_posixsubprocess", "_socket", "_winapi", "multiprocessing",
                         "_multiprocessing", "gc"})
    changes = frozenset({"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
                         "os.chown", "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod",
                         "os.chdir", "os.fchdir"})
    real, isdir, fsdecode = os.path.realpath, os.path.isdir, os.fsdecode
    home = real(os.getcwd()) + os.sep

    def inside(path):
        return not isinstance(path, (str, bytes)) or (real(fsdecode(path)) + "/").startswith(home)

    def guard(event, args):
        if event == "open":
            path, _, flags = args
            if inside(path) or path == "/dev/null":
                return
            # an open folder would be a way around: paths relative to it do not show where they lead
            if (flags and flags & writes) or isdir(path):
                raise PermissionError("the sandbox lets nothing be written outside its folder")
        elif event in changes:
            if not all(inside(path) for path in args if isinstance(path, (str, bytes))):
                raise PermissionError("the sandbox lets nothing be changed outside its folder")
        elif event in events or event.startswith(prefixes) or (event == "import" and args[0] in modules):
            raise PermissionError("the sandbox refuses " + event)

    return guard


def play(program, token, out, guard):
    write, leave = os.write, os._exit

    def verdict(word):
        write(out, (token + " " + word).encode())
        leave(0)

    try:
        code = compile(program, "program.py", "exec")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        sys.addaudithook(guard)
        exec(code, main.__dict__)
    except BaseException as error:
        verdict(type(error).__name__)
    verdict("passed")


play(job.pop("program"), job.pop("token"), out, fence())
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a program: ``passed``, the name of its exception, ``timeout``, or ``ended`` without a verdict."""

    status: str

    @property
    def passed(self) -> bool:
        return self.status == PASSED


def check() -> None:
    """Whether programs can be run with limits here.

    Raises:
        UserError: this system has no resource limits.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError("--tasks humaneval: needs process limits (the resource module), which this system does not have; "
                        "run it on Linux or in a container")


def run(program: str, seconds: int, memory_mb: int) -> Outcome:
    """Run a program to its end or to a limit.

    Args:
        program: Python source; it passes if it runs through without an exception.
        seconds: CPU time; wall-clock time may be 3 s longer.
        memory_mb: address space, the interpreter included.
    """
    # fresh for each program: none can pass by what another one saw
    token = secrets.token_hex(16)
    job = {"program": program, "token": token, "seconds": seconds, "memory": memory_mb << 20, "file_bytes": _FILE_BYTES}
    with tempfile.TemporaryDirectory(prefix="code-", ignore_cleanup_errors=True) as folder:
        # nothing of our environment goes in: it may hold keys; -I and -S: only the standard library can be imported
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _RUNNER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={"TMPDIR": folder, "HOME": folder, "PYTHONHASHSEED": "0"},
            # a group of its own, so that what it started can be ended with it
            start_new_session=True)
        try:
            reply, _ = process.communicate(json.dumps(job).encode(), timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Outcome("timeout")
        finally:
            # also after a normal end: children may live on
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                stream.close()
    given, _, status = reply.decode("utf-8", "replace").partition(" ")
    if given == token and status:
        return Outcome(status)
    # what the kernel ends a program with at its CPU limit, and we at the wall clock's
    return Outcome("timeout" if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else "ended")
