"""One command at a time writes a run: a lock beside its folder, which the system drops when the process ends, however."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
#: A file system without locks (some Lustre and FUSE mounts): commands go on as if they were alone.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def alone(target: Path) -> Iterator[bool]:
    """Be the only one that writes ``target`` while the block runs; waits for the one that does, and says so.

    Yields:
        Whether it had to wait: ``target`` may be finished now.

    Raises:
        OSError: the folder of ``target`` cannot be written to.
    """
    path = lock_path(target)
    new = not path.parent.exists()
    file, waited = _taken(path)
    try:
        yield waited
    finally:
        # removed while it is held: whoever waits for it sees that its file has gone, and makes a new one
        path.unlink(missing_ok=True)
        file.close()
        # a command that failed leaves no empty folder of its own behind
        with contextlib.suppress(OSError):
            if new:
                path.parent.rmdir()


def wait_for(target: Path) -> None:
    """Return when no other process writes ``target``; what a killed one left of its lock is removed."""
    path = lock_path(target)
    try:
        file = path.open("r+", encoding="utf-8")
    except OSError:
        # there is none, or nobody can write here
        return
    with file:
        _wait(file, path)
        if _named(file, path):
            path.unlink(missing_ok=True)


def _taken(path: Path) -> tuple[IO[str], bool]:
    waited = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # whoever had the lock took the folder along
            continue
        waited |= _wait(file, path)
        # its holder removes the file when it is done: a lock on a file without a name keeps nobody out
        if _named(file, path):
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file, waited


def _named(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait(file: IO[str], path: Path) -> bool:
    """Lock; returns whether another process had it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        log.warning("%s is being written by %s: waiting for it (Ctrl-C ends the wait)",
                    path.with_name(path.name.removeprefix(".").removesuffix(".lock")), file.read() or "another process")
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return False
