"""Judgements that are never made twice: one SQLite file, keyed by judge, version, prompt, answer and counterpart."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

import console
from errors import UserError
from evaluator.judges.protocol import Item, Judge, Verdict, divides
from models.base import processes

#: Seconds to wait for another process that is writing to the same file.
_PATIENCE = 60


class Cache:
    """Verdicts on disk. Each ``put`` is committed before it returns, so a killed run loses none that was made.

    Raises:
        UserError: the file cannot be written or is no such cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # an API client's workers share one connection, one at a time
            self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            _log_ahead(self._db)
            # a killed process loses nothing in this mode either, and no verdict waits for the disk
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: cannot be used as the cache of judgements ({error}); "
                            "remove it or choose another --output_dir") from error

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, judge: Judge, item: Item) -> Verdict | None:
        """The verdict of an earlier run, or None."""
        with closing(self._db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key(judge, item),))) as found:
            row = found.fetchone()
        return Verdict(**json.loads(row[0])) if row else None

    def put(self, judge: Judge, item: Item, verdict: Verdict) -> None:
        """Keep a verdict. Failed ones are not kept."""
        if verdict.final:
            self._db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)",
                             (key(judge, item), json.dumps(asdict(verdict))))


def _log_ahead(db: sqlite3.Connection) -> None:
    """Turn on write-ahead logging. Two that do so at once on a new file can block each other; SQLite then does not wait."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)


def key(judge: Judge, item: Item) -> bytes:
    """The cache key of one judgement: lengths go in, so that no two fields can be shifted into each other."""
    digest = hashlib.blake2b(digest_size=20)
    for text in (judge.name, judge.version, item.prompt, item.answer, item.other):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


@contextmanager
def opened(path: Path) -> Iterator[Cache | None]:
    """The cache in the first process of a launch, None in the others: one process reads and writes the file."""
    if processes.rank():
        yield None
        return
    with Cache(path) as cache:
        yield cache


def verdicts(judge: Judge, items: Sequence[Item], cache: Cache | None) -> list[Verdict]:
    """A verdict for every item: cached ones are read, equal items are judged once, the rest is judged and kept at once.

    Of several processes all have a share in what a local judge reads; other judges are asked by the first alone.
    """
    def known() -> dict[int, Verdict]:
        return {i: verdict for i, item in enumerate(items) if (verdict := cache.get(judge, item))}

    if divides(judge):
        return _verdicts(judge, items, cache, processes.agreed(known))
    return processes.agreed(lambda: _verdicts(judge, items, cache, known()))


def _verdicts(judge: Judge, items: Sequence[Item], cache: Cache | None, by_position: dict[int, Verdict]) -> list[Verdict]:
    same: dict[bytes, list[int]] = {}
    for i, item in enumerate(items):
        if i not in by_position:
            same.setdefault(key(judge, item), []).append(i)
    groups = list(same.values())
    todo = [items[group[0]] for group in groups]
    for position, verdict in tqdm(judge.judge(todo), total=len(todo), desc=judge.name, unit="answer",
                                  **console.bar(bool(todo) and cache is not None)):
        if cache is not None:
            cache.put(judge, todo[position], verdict)
        by_position |= dict.fromkeys(groups[position], verdict)
    # a judge that skips a position is a bug: scores must not be made of fewer answers in silence
    missing = [i for i in range(len(items)) if i not in by_position]
    if missing:
        raise RuntimeError(f"{judge.name} gave no verdict for {len(missing)} of {len(items)} items")
    return [by_position[i] for i in range(len(items))]
