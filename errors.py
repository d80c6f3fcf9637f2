"""The one error that a user can mend: it names the flag or file, the value, what is allowed and the next step.

Commands run inside ``exit_on_user_error``: bad input, a full disk or an unwritable folder end with exit code 2 and a
plain sentence instead of a traceback. A bug keeps its traceback and exit code 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator


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


#: Seconds; a launcher looks after its processes ten times a second.
_MOMENT = 3.0


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print each problem of a UserError (or of a full disk, a read-only folder) and exit with code 2."""
    try:
        yield
    except UserError as error:
        _let_the_first_speak()
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        # of system errors only those that the user can mend: the others are bugs and keep their traceback
        number = _os_error(error)
        if number not in _OS_ADVICE:
            raise
        _let_the_first_speak()
        print(f"error: {getattr(error, 'filename', None) or 'a file'}: {_OS_ADVICE[number]}", file=sys.stderr)
        raise SystemExit(2) from None


def _let_the_first_speak() -> None:
    """Wait in all processes of a launch but a machine's first.

    Most errors come to all of them alike: the first one tells it, and the launcher ends the others. What comes to another
    one alone is told all the same.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_MOMENT)


def _os_error(error: Exception) -> int | None:
    """The error number of an OSError, or of one that a Rust extension (safetensors) only put into its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
