"""Start a program and its checker, each confined by itself, and wait: ``python -s -S evaluator/sandbox JOB_FLAGS``.

JOB_FLAGS is JSON: confined, seconds, memory, file_bytes. The checker reads the job from standard input and writes its
verdict to standard output; the program has neither. A line on standard error says which step the kernel refused, nothing
else is written there; the exit status is 3 where the kernel ended the program at a limit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import calls
import kernel
import roles

AT_LIMIT = 3
#: Seconds that a program gets to end by itself once its checker is done.
_LINGER = 0.2


def launch(flags: dict[str, Any]) -> int:
    """Run both sides; the exit status."""
    sys.argv, sys.orig_argv = [""], []
    program_reads, checker_asks = os.pipe()
    checker_hears, program_tells = os.pipe()
    # nothing has been read yet: what a fork copies holds neither the tests nor the other side's memory
    program = start(flags, (program_reads, program_tells), lambda: be_program(program_reads, program_tells))
    checker = start(flags, (0, 1, checker_asks, checker_hears), lambda: be_checker(checker_asks, checker_hears))
    for fd in (0, 1, program_reads, program_tells, checker_asks, checker_hears):
        os.close(fd)
    os.waitpid(checker, 0)
    until = time.monotonic() + _LINGER
    while not (ended := os.waitpid(program, os.WNOHANG))[0]:
        if time.monotonic() > until:
            # its guardian; the kernel then ends the program
            os.kill(program, signal.SIGKILL)
            return 0
        time.sleep(0.002)
    return AT_LIMIT if os.waitstatus_to_exitcode(ended[1]) in (AT_LIMIT, -signal.SIGKILL, -signal.SIGXCPU) else 0


def start(flags: dict[str, Any], keep: tuple[int, ...], role: Callable[[], None]) -> int:
    """Fork a side with these descriptors and no others; the process number of its guardian."""
    if not flags["confined"]:
        return _fork(lambda: side(flags, keep, role))
    unshared, tell_unshared = os.pipe()
    mapped, tell_mapped = os.pipe()

    def guardian() -> int:
        _only((*keep, tell_unshared, mapped))
        kernel.end_with_parent()
        kernel.leave_namespaces()
        os.write(tell_unshared, b"x")
        if not os.read(mapped, 1):
            return 1  # the launcher has said why
        os.close(tell_unshared)
        os.close(mapped)
        # only children enter the new pid namespace: this one is its first process, and when it ends nothing is left there
        ended = os.waitstatus_to_exitcode(os.waitpid(_fork(lambda: side(flags, keep, role)), 0)[1])
        # a status that the program chose says nothing; other signals are a crash, which no time would have helped
        return AT_LIMIT if ended in (-signal.SIGKILL, -signal.SIGXCPU) else 0

    pid = _fork(guardian)
    for fd in (tell_unshared, mapped):
        os.close(fd)
    try:
        if os.read(unshared, 1):
            kernel.map_ids(pid)
            os.write(tell_mapped, b"x")
    finally:
        for fd in (unshared, tell_mapped):
            os.close(fd)
    return pid


def side(flags: dict[str, Any], keep: tuple[int, ...], role: Callable[[], None]) -> int:
    """Confine this process, then play a role in it."""
    _only(keep)
    if flags["confined"]:
        kernel.enter_root()
    kernel.limit(flags["seconds"], flags["memory"], flags["file_bytes"])
    if flags["confined"]:
        kernel.drop_rights()
        kernel.landlock()
        null = os.open("/dev/null", os.O_RDWR)
        kernel.filter_calls(calls.program())
    else:
        null = os.open(os.devnull, os.O_RDWR)
    for fd in {0, 1, 2} - set(keep):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    role()
    return 0


def be_program(reads: int, tells: int) -> None:
    with os.fdopen(reads, "rb") as requests, os.fdopen(tells, "wb") as replies:
        roles.program(requests, replies)


def be_checker(asks: int, hears: int) -> None:
    with os.fdopen(0, "rb", closefd=False) as stdin:
        job = json.loads(stdin.read())
    out = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)

    def verdict(passed: bool, status: str) -> NoReturn:
        os.write(out, json.dumps({"passed": passed, "status": status}).encode())
        os._exit(0)

    with os.fdopen(asks, "wb") as requests, os.fdopen(hears, "rb") as replies:
        roles.checker(job, requests, replies, verdict)


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = work()
    except Exception as error:
        # once a side is confined, this goes to /dev/null
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(status)


def _only(keep: tuple[int, ...]) -> None:
    """Close every descriptor but these and standard error, which still takes a refusal."""
    last = -1
    for fd in sorted({*keep, 2}):
        if fd > last + 1:  # closerange(0, 0) closes everything
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 1 << 16)


if __name__ == "__main__":
    ended = 1
    try:
        kernel.end_with_parent()
        ended = launch(json.loads(sys.argv[1]))
    except Exception as error:
        os.write(2, f"{error}\n".encode())
    os._exit(ended)
