"""The fingerprint of a base: which weights and which configuration, every byte of them, read once and remembered.

Two bases that differ in one norm weight, one row of the embedding or one number of config.json have different fingerprints.
A file is read whole once; what it hashed to is kept in the cache under its place, size, times and inode, so that a later
start reads nothing of a 13 GB base. Fingerprints of earlier versions sampled the weights; they are still understood.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.assets import cache_dir, sha256_of
from errors import UserError

log = logging.getLogger(__name__)
#: What a fingerprint of all bytes begins with; one without it was sampled by an earlier version.
VERSION = "v2-"
#: Files beside the weights that make them another model.
_CONFIG = "config.json"
#: Bytes of each block that a sampled fingerprint reads.
_SAMPLE = 1 << 16
#: A file as young as this is not remembered: it may be written again within one tick of its file system's clock.
_SETTLED_NS = 2_000_000_000
_READERS = 4


def fingerprint(folder: Path) -> str:
    """``v2-`` and a SHA-256 over config.json and every byte of every .safetensors file of a folder.

    Raises:
        UserError: a file cannot be read.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    files += [path for path in [folder / _CONFIG] if path.is_file()]
    try:
        # hashing releases the interpreter's lock: shards are read side by side
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(_remembered, files))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror}); check its permissions and the disk"
                        ) from None
    return VERSION + hashlib.sha256(json.dumps([[path.name, digest] for path, digest in zip(files, digests, strict=True)]
                                               ).encode()).hexdigest()


def sampled_fingerprint(folder: Path) -> str:
    """What earlier versions recorded: SHA-256 over each weight file's header and 256 evenly spaced blocks of 64 kB.

    Bases that differ between the blocks, or in config.json alone, share it: it is only compared with what was recorded then.
    """
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.glob("*.safetensors") if f.is_file()):
        size = file.stat().st_size
        with file.open("rb") as stream:
            # names and shapes decide, too: two files of equal samples may call them otherwise
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            for i in range(256):
                # from the first byte to the last: 255 steps between 256 blocks; short files are read more than once
                stream.seek(max(0, i * (size - _SAMPLE) // 255))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def fingerprint_like(recorded: str | None, folder: Path) -> str:
    """The fingerprint of ``folder`` in the version of a recorded one, so that the two can be compared.

    A run that was made before fingerprints read all bytes is held to what it recorded then; no record: today's version.
    """
    # a hash of our own is told by its length: anything else that stands in a manifest gets today's, and differs
    if isinstance(recorded, str) and not recorded.startswith(VERSION) and len(recorded) == 64:
        return sampled_fingerprint(folder)
    return fingerprint(folder)


def same_base(recorded: str, folder: Path) -> bool:
    """Whether ``folder`` is the base whose fingerprint was recorded, by this version or an earlier one."""
    return recorded == fingerprint_like(recorded, folder)


def _remembered(file: Path) -> str:
    """SHA-256 of a file, from the cache where it is known."""
    stat = file.stat()
    # the time of the last change of the inode cannot be set back, as that of the contents can
    key = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev])
    note = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        known = note.read_text(encoding="ascii", errors="replace")
        # a note that was cut short is none
        if len(known) == 64:
            return known
    digest = sha256_of(file)
    after = file.stat()
    unchanged = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if unchanged and time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        _note(note, digest)
    return digest


def _note(note: Path, digest: str) -> None:
    """Keep a digest for the next start; renamed, so that another process never reads half of it."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(digest)
        os.replace(part, note)
    except OSError as error:
        log.info("%s: cannot be written (%s); the weights are hashed again at the next start", note.parent, error.strerror)
