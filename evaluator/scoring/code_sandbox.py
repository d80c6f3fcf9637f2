"""Run a program that a model wrote, and its tests, in two processes that the kernel confines; only JSON passes between them.

What confines them lies in evaluator/sandbox/; what that holds and what not, in docs/security.md. The verdict is computed
where no line of the program runs, so that the program can give wrong results and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from errors import UserError

_LAUNCHER = Path(__file__).resolve().parent.parent / "sandbox"
#: Wall-clock seconds beyond five times the CPU limit: that limit decides, on a busy machine too; this ends what sleeps.
_GRACE = 5
_FILE_BYTES = 1 << 20
_AT_LIMIT = 3
#: What is asked of the kernel before anything is scored, and must pass; a library that nobody may read shows here too.
_PROBE = {"program": "import statistics\ndef f(x):\n    return statistics.mean([x, x]) + 1\n",
          "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 2\n"}


@dataclass(frozen=True)
class Outcome:
    """What became of a program; the status is passed, an exception's name, timeout, ended, or unreadable reply."""

    passed: bool
    status: str


class Refused(UserError):
    """This system confines no process; the text is what it said."""


@cache
def missing() -> str:
    """What this system lacks to confine a process; empty where a confined program has just been run."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces and no seccomp"
    try:
        outcome = _run(_PROBE, 5, 512, confined=True)
    except Refused as refused:
        return str(refused)
    if outcome.status == "ModuleNotFoundError":
        return f"Python's library at {sys.base_prefix} is not readable for other users than its owner"
    return "" if outcome.passed else f"a trivial program ended with {outcome.status}"


def check(unsafe: bool = False) -> None:
    """Whether programs can be run here.

    Args:
        unsafe: take limits alone, without confinement.

    Raises:
        UserError: no confinement, and not asked to go without; no process limits at all.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError("--tasks humaneval: needs process limits (the resource module), which this system does not have; "
                        "run it on Linux or in a container")
    if not unsafe and (lack := missing()):
        raise UserError(f"--tasks humaneval: this system does not confine the code that the model wrote ({lack}); use Linux "
                        "5.12 or newer and allow user namespaces (sysctl user.max_user_namespaces=15000, on Ubuntu also "
                        "kernel.apparmor_restrict_unprivileged_userns=0; docker run --security-opt seccomp=unconfined "
                        "--security-opt apparmor=unconfined --cap-add SYS_ADMIN), drop humaneval, or, on a machine that "
                        "you can throw away, run it with limits alone: --unsafe_code yes (docs/security.md)")


def run(prompt: str, answer: str, test: str, entry_point: str, seconds: int, memory_mb: int, *,
        unsafe: bool = False) -> Outcome:
    """Whether a function that a model completed passes its tests.

    Args:
        prompt: the task's code up to the function's docstring; its helpers may be called by the tests.
        answer: what the model wrote after it.
        test: defines ``check(candidate)``; arguments and results must be plain data (numbers, strings, containers, None).
        seconds: CPU time of each process; the wall clock ends both after 5 times as long and 5 s.
        memory_mb: address space of each process, the interpreter included.
        unsafe: with limits, but not confined.

    Raises:
        UserError: the kernel refused a step, or the test passes a function to the program.
    """
    job = {"program": prompt + answer, "prompt": prompt, "test": test, "entry_point": entry_point}
    outcome = _run(job, seconds, memory_mb, confined=not unsafe)
    what, _, why = outcome.status.partition(": ")
    if what == "untestable":
        raise UserError(f"humaneval: the test of {entry_point} cannot be run: {why}; arguments "
                        "cross to the program's process as data (numbers, strings, lists, tuples, sets, dicts, None)")
    return outcome


def _run(job: dict[str, str], seconds: int, memory_mb: int, *, confined: bool) -> Outcome:
    flags = {"confined": confined, "seconds": seconds, "memory": memory_mb << 20, "file_bytes": _FILE_BYTES}
    process = subprocess.Popen(
        # -s and -S: only the standard library can be imported; no environment of ours, which may hold keys. Not -I, which
        # passes over the seed of hashes too: a program that lists a set would pass by chance
        [sys.executable, "-s", "-S", str(_LAUNCHER), json.dumps(flags)], cwd="/", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONHASHSEED": "0"},
        # no terminal, and a group of its own, so that all of it can be ended at once
        start_new_session=True)
    try:
        verdict, refusal = process.communicate(json.dumps(job).encode(), timeout=5 * seconds + _GRACE)
    except subprocess.TimeoutExpired:
        return Outcome(passed=False, status="timeout")
    finally:
        # also after a normal end
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    if refusal:
        raise Refused(refusal.decode("utf-8", "replace").splitlines()[0])
    if not verdict:
        # the checker itself met a limit
        return Outcome(passed=False, status="timeout")
    found = json.loads(verdict)
    if found["status"] == "ended" and process.returncode == _AT_LIMIT:
        return Outcome(passed=False, status="timeout")
    return Outcome(passed=found["passed"] is True, status=found["status"])
