"""The one error that a user can mend: it names the flag or file, the value, what is allowed and the next step.

Commands run inside ``exit_on_user_error``: bad input, a full disk or an unwritable folder end with exit code 2 and a
plain sentence instead of a traceback. A bug keeps its traceback and exit code 1. Of several processes one says it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

#: Asked before an error is said whether another process of the launch has said one; models/base/processes.py adds to it.
TELLS: list[Callable[[], bool]] = []
#: What a process says whose neighbour is gone, unless that one has said why.
LOST = ("another process of this launch ended without a word (killed, or out of memory: the launcher's report names it); "
        "what was finished is kept: give the same command again, on any number of processes")
#: gloo's words of a neighbour that is gone.
_GONE = re.compile("gloo.*Connection (closed|reset) by peer", re.S)
#: Seconds that a process waits with an error where they cannot ask each other yet. An error of all is said by the first,
#: whose end makes the launcher end the others.
_GRACE = 15.0


class UserError(Exception):
    """Bad input or a broken environment. Carries every problem found, so that the user mends them all at once."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SharedError(UserError):
    """What all processes of a launch find at the same moment: the first one says it."""


_OS_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or point --output_dir at another disk, then run the same command",
    errno.EDQUOT: "your quota is used up: free some space or point --output_dir elsewhere, then run the same command",
    errno.EFBIG: "it may not grow that large here (ulimit -f, or a limit of the file system): raise the limit or point "
                 "--output_dir elsewhere, then run the same command",
    errno.EACCES: "no permission: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose a folder that you may write to",
}


def os_advice(number: int | None) -> str | None:
    """What is wrong and what to do about a system error of this number; None of one that a user cannot mend."""
    return _OS_ADVICE.get(number) if number is not None else None


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print each problem of a UserError (or of a full disk, a read-only folder) and exit with code 2."""
    try:
        yield
    except UserError as error:
        if _alone_or_first() if isinstance(error, SharedError) else _first_to_tell():
            for problem in error.problems:
                _say(problem)
        raise SystemExit(2) from None
    except Exception as error:
        # of system errors only those that the user can mend: the others are bugs and keep their traceback
        if out_of_memory(error):
            # of no other process: each says what became of its own memory
            _say(f"out of memory ({_first_line(error)}): end other programs, or take a machine with more")
            raise SystemExit(2) from None
        number = _os_error(error)
        gone = isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))
        if not _first_to_tell():
            raise SystemExit(2 if gone or number in _OS_ADVICE else 1) from None
        if gone:
            _say(LOST)
            raise SystemExit(2) from None
        if number not in _OS_ADVICE:
            raise
        _say(f"{getattr(error, 'filename', None) or 'a file'}: {_OS_ADVICE[number]}")
        raise SystemExit(2) from None


def _first_to_tell() -> bool:
    """Whether this process says what is wrong: the only one, or of several the first that comes to it."""
    if TELLS:
        return TELLS[0]()
    if not _alone_or_first():
        time.sleep(_GRACE)
    return True


def _alone_or_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(problem: str) -> None:
    write_line(f"error: {problem}")


def write_line(text: str) -> None:
    """Write a line on stderr, above a progress bar where there is one."""
    # a bar leaves the cursor behind itself; where there is none, nothing is imported
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def fits(smaller: Sequence[str]) -> Iterator[None]:
    """Where memory runs out within the block, say which settings need less.

    Args:
        smaller: flags with such values, the most promising first (``flags.memory.smaller``).

    Raises:
        UserError: out of memory.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        way = ", or ".join(smaller) or "a machine with more"
        raise UserError(f"out of memory ({_first_line(error)}): try {way}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the machine's memory ran out; torch's errors are told by their words: none is loaded here."""
    # OutOfMemoryError: CUDA's; the CPU's allocator raises a plain RuntimeError, C++ libraries bad_alloc
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


_MEMORY = re.compile("can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|bad_?alloc|Cannot allocate memory")


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    # torch names the line of its own source first
    text = text.partition("DefaultCPUAllocator: ")[2] or text
    return text if len(text) <= 160 else f"{text[:157]}..."


def _os_error(error: Exception) -> int | None:
    """The error number of an OSError, or of one that a Rust extension (safetensors) only put into its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not known; empty where nothing is near."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def nearest_place(place: Path) -> str:
    """A hint for a file or folder that is not there, by the names beside it; empty where nothing is near."""
    if place.exists():
        return ""
    try:
        beside = {path.stem: path.name for path in sorted(place.parent.iterdir())}
    except OSError:  # its folder is not there either, or may not be read
        return ""
    # by the stems: two endings that agree are no likeness
    match = difflib.get_close_matches(place.stem, list(beside), n=1, cutoff=0.6)
    return f" (did you mean {beside[match[0]]}?)" if match else ""
