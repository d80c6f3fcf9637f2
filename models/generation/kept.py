"""Finished batches of a command that answers, kept as they come: what a kill leaves, the next start goes on from.

Beside the folder of answers, not in it: that is made anew at each start. Every process of a launch appends to a file of its
own, ``.NAME.answers.jsonl`` or ``.NAME.answers.RANK.jsonl``; the first one collects what earlier starts left, of however
many processes, and holds the lock for which a second command waits.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from models.base import processes

log = logging.getLogger(__name__)


class KeptAnswers:
    """The batches of one folder of answers; made by ``keeping``.

    Args:
        path: the first process's file.
        file: it, open and locked; None in the other processes.
        waited: whether another command held it: the answers may be finished now.
    """

    def __init__(self, path: Path, file: TextIO | None, waited: bool = False) -> None:
        self._path, self._file, self.waited = path, file, waited
        #: Batch number -> its rows: those of earlier starts (in the first process), and those of this process.
        self.rows: dict[int, list[dict]] = {}

    def begin(self, settings: Mapping[str, Any]) -> set[int]:
        """Numbers of the batches that earlier starts with the same settings answered; the same in every process."""
        # the first line tells whose answers these are; with other flags, or another batch size, they are begun anew
        head = json.dumps(settings, sort_keys=True)
        finished = processes.agreed(lambda: self._collect(head))
        if self._file is None:
            self._file = self._path.with_suffix(f".{processes.rank()}.jsonl").open("w", encoding="utf-8")
            self._write(head)
        return finished

    def add(self, number: int, rows: list[dict]) -> None:
        """Keep a batch: a kill loses the one under way and no other."""
        self.rows[number] = rows
        self._write(json.dumps({number: rows}, ensure_ascii=False))

    def all_rows(self, batches: int) -> list[dict]:
        """Rows of all batches and processes, in the order of the prompts; every batch must be there, once."""
        found = processes.merged(self.rows)
        if sorted(found) != list(range(batches)):
            raise RuntimeError(f"{self._path}: {len(found)} of {batches} batches were answered")
        # batches were made by length
        return sorted((row for rows in found.values() for row in rows), key=lambda row: row["index"])

    def remove(self) -> None:
        """Delete the files; called once the answers are safe under their final name."""
        if processes.rank() == 0:
            for path in (*_others(self._path), self._path):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and with it end the lock."""
        if self._file is not None:
            # nothing was begun: a model that could not be loaded leaves nothing behind
            if processes.rank() == 0 and not os.fstat(self._file.fileno()).st_size:
                self._path.unlink(missing_ok=True)
            self._file.close()

    @property
    def _opened(self) -> TextIO:
        """This process's file; a RuntimeError before ``begin`` opens it."""
        if self._file is None:
            raise RuntimeError(f"{self._path}: begin first")
        return self._file

    def _collect(self, head: str) -> set[int]:
        """Read what is there; batches of other processes move into the first one's file."""
        file = self._opened
        file.seek(0)
        lines = file.read().split("\n")
        if lines[0] != head:
            file.truncate(0)
            self._write(head)
        else:
            self.rows = dict(_batches(lines[1:], self._path))
            # behind a torn line a new one begins
            if lines[-1]:
                file.write("\n")
        for other in _others(self._path):
            lines = other.read_text(encoding="utf-8").split("\n")
            for number, rows in _batches(lines[1:], other) if lines[0] == head else ():
                if number not in self.rows:
                    self.add(number, rows)
            # only now: they stand in the first one's file
            other.unlink()
        return set(self.rows)

    def _write(self, line: str) -> None:
        file = self._opened
        file.write(f"{line}\n")
        file.flush()


@contextmanager
def keeping(folder: Path) -> Iterator[KeptAnswers]:
    """The kept batches of a folder of answers, for this command alone; waits for another one that answers into it."""
    path = _path(folder)
    kept = KeptAnswers(path, *(_locked(path, folder) if processes.rank() == 0 else (None,)))
    try:
        yield kept
    finally:
        kept.close()


def remove_left(folder: Path) -> None:
    """Delete what a kill left beside finished answers; another command that is answering anew keeps its own."""
    path = _path(folder)
    try:
        file = path.open("a+", encoding="utf-8") if path.exists() else None
    except OSError:  # read-only: nothing can be answered anew here either
        return
    if file is None:
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        with suppress(OSError):
            for old in (*_others(path), path):
                old.unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.answers.jsonl")


def _others(path: Path) -> list[Path]:
    """The files of the other processes."""
    own = re.compile(re.escape(path.stem) + r"\.\d+\.jsonl")
    return sorted(entry for entry in path.parent.iterdir() if own.fullmatch(entry.name))


def _locked(path: Path, folder: Path, waited: bool = False) -> tuple[TextIO, bool]:
    """The open file under its lock, and whether another command had it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s: another command is answering into this folder: waiting for it (Ctrl-C ends the wait)", folder)
        waited = True
        fcntl.flock(file, fcntl.LOCK_EX)
    if not os.fstat(file.fileno()).st_nlink:
        # the other command ended in between, and took its file along
        file.close()
        return _locked(path, folder, waited)
    return file, waited


def _batches(lines: list[str], path: Path) -> Iterator[tuple[int, list[dict]]]:
    for line in filter(None, lines):
        try:
            yield from ((int(number), rows) for number, rows in json.loads(line).items())
        except (ValueError, AttributeError):
            log.info("%s: dropping a line that was cut off", path)
