"""The one error that a user can mend: it names the flag or file, the value, what is allowed and the next step.

Commands run inside ``exit_on_user_error``: bad input, a full disk or an unwritable folder end with exit code 2 and a
plain sentence instead of a traceback. A bug keeps its traceback and exit code 1. Of several processes one says it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

#: Asked before an error is said whether another process of the launch has said one; models/base/processes.py adds to it.
TELLS: list[Callable[[], bool]] = []
#: Seconds that a process waits with an error where they cannot ask each other yet. An error of all is said by the first,
#: whose end makes the launcher end the others.
_GRACE = 5.0


class UserError(Exception):
    """Bad input or a broken environment. Carries every problem found, so that the user mends them all at once."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


_OS_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or point --output_dir at another disk, then run the same command",
    errno.EACCES: "no permission: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose a folder that you may write to",
}


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print each problem of a UserError (or of a full disk, a read-only folder) and exit with code 2."""
    try:
        yield
    except UserError as error:
        if _first_to_tell():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        # of system errors only those that the user can mend: the others are bugs and keep their traceback
        number = _os_error(error)
        if not _first_to_tell():
            raise SystemExit(2 if number in _OS_ADVICE else 1) from None
        if number not in _OS_ADVICE:
            raise
        print(f"error: {getattr(error, 'filename', None) or 'a file'}: {_OS_ADVICE[number]}", file=sys.stderr)
        raise SystemExit(2) from None


def _first_to_tell() -> bool:
    """Whether this process says what is wrong: the only one, or of several the first that comes to it."""
    if TELLS:
        return TELLS[0]()
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_GRACE)
    return True


def _os_error(error: Exception) -> int | None:
    """The error number of an OSError, or of one that a Rust extension (safetensors) only put into its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
