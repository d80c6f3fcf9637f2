"""The two sides of a run: the program answers calls, the checker makes them and judges what comes back.

The program never sees the tests, nor any value that they expect: it gets arguments and gives results. The checker runs the
task's own prompt and tests, never a line that the model wrote.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import IO, Any, NoReturn

import values

#: Bytes of one reply: more is refused.
MOST_BYTES = 8 << 20
#: Would end an iteration in the test where an error was meant.
_ENDS_ITERATION = (StopIteration, StopAsyncIteration)


def program(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Run the model's program, then call its function for each request until there are no more."""
    def reply(**content: Any) -> None:
        replies.write(json.dumps({"to": asked["id"], **content}).encode() + b"\n")
        replies.flush()

    job = asked = json.loads(requests.readline())
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(job["program"], "program.py", "exec"), main.__dict__)
        function = getattr(main, job["entry_point"])
    except BaseException as error:
        reply(raised=type(error).__name__, text=str(error))
        return
    reply(loaded=True)
    for line in requests:
        try:
            asked = json.loads(line)
            args, named = values.decode(asked["args"]), values.decode(asked["named"])
            given = values.encode(function(*args, **named))
        except BaseException as error:
            reply(raised=type(error).__name__, text=str(error))
        else:
            reply(value=given)


def checker(job: dict[str, str], requests: IO[bytes], replies: IO[bytes], verdict: Callable[[bool, str], NoReturn]) -> None:
    """Run a task's tests on the function behind the pipes, and end with ``verdict(passed, what happened)``.

    Args:
        job: program (prompt and answer), prompt, test (defines ``check``), entry_point.
    """
    def ask(content: dict[str, Any]) -> Any:
        # drawn anew: a reply that was written before its question is none
        number = os.urandom(8).hex()
        try:
            requests.write(json.dumps({"id": number, **content}).encode() + b"\n")
            requests.flush()
        except BrokenPipeError:
            verdict(False, "ended")
        line = replies.readline(MOST_BYTES)
        if not line:
            verdict(False, "ended")
        try:
            # a reply that goes on is no JSON here, and ends the run
            found = json.loads(line)
            if found["to"] != number:
                raise ValueError("an answer to another question")
            if "raised" in found:
                return _error(found["raised"], str(found["text"])[:1000])
            return values.decode(found["value"]) if "value" in found else found["loaded"]
        except Exception:
            verdict(False, "unreadable reply")

    def candidate(*args: Any, **named: Any) -> Any:
        try:
            call = {"args": _arguments(list(args)), "named": _arguments(named)}
        except TypeError as error:
            verdict(False, f"untestable: {error}")
        given = ask(call)
        if isinstance(given, BaseException):
            raise given
        return given

    loaded = ask({"program": job["program"], "entry_point": job["entry_point"]})
    if isinstance(loaded, BaseException):
        verdict(False, type(loaded).__name__)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if "random" in job["test"]:
        import random

        # some tests of HumanEval draw numbers without a seed
        random.seed(0)
    try:
        # its helpers, which some tests call; its last function is the one in question
        exec(_whole(job["prompt"]), main.__dict__)
        setattr(main, job["entry_point"], candidate)
        exec(compile(job["test"], "test.py", "exec"), main.__dict__)
        main.check(candidate)
    except BaseException as error:
        verdict(False, type(error).__name__)
    verdict(True, "passed")


def _error(name: Any, text: str) -> Exception:
    """The built-in exception of that name, else a RuntimeError: the name is the program's word."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _ENDS_ITERATION):
        try:
            return kind(text)
        except TypeError:
            pass  # UnicodeDecodeError and its like want more than a text
    return RuntimeError(text)


def _arguments(given: Any) -> Any:
    """Arguments as JSON data; a TypeError where the test passes what cannot leave the checker, a function for example."""
    def unknown(value: Any) -> bool:
        if isinstance(value, (list, tuple, set, frozenset)):
            return any(map(unknown, value))
        if isinstance(value, dict):
            return any(unknown(key) or unknown(item) for key, item in value.items())
        return callable(value)

    if unknown(given):
        raise TypeError("the test passes a function or class to the program")
    return values.encode(given)


def _whole(prompt: str) -> types.CodeType:
    """A prompt's code; one that stops at a function's head gets an empty body."""
    try:
        return compile(prompt, "prompt.py", "exec")
    except SyntaxError:
        return compile(prompt + "\n    pass\n", "prompt.py", "exec")
