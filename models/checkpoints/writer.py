"""Output files of known size, written in place and in any order; nothing bears its final name before all is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from errors import UserError, os_advice
from models.checkpoints.header import KINDS
from models.checkpoints.reader import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

_PART, _NEW = ".part", ".new"
#: Bytes of a checksum's read.
_BLOCK = 1 << 22
#: What a file system answers that cannot reserve space ahead.
_NO_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class Place:
    """A tensor's file, type, first byte in it and length in bytes."""

    file: str
    dtype: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The planned files: header (with its length in front) and full size of each in bytes, the place of each tensor."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def plan_layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int,
                metadata: Mapping[str, str] | None = None) -> Layout:
    """Shards in order of the tensors, each as full as the limit of data bytes allows; named as transformers names them.

    Args:
        tensors: (name, safetensors type, shape).
        metadata: for every header, beside {"format": "pt"}.

    Raises:
        ValueError: a name occurs twice.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * KINDS[dtype][0]
        # a tensor is never split: one that is larger than the limit gets a shard of its own
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += nbytes
    names = [SINGLE] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    headers, sizes, places = {}, {}, {}
    for file, shard in zip(names, shards, strict=True):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        # wide types first, as the reference implementation has it: each value starts at a multiple of its size
        for name, dtype, shape in sorted(shard, key=lambda t: -KINDS[t[1]][0]):
            end = offset + prod(shape) * KINDS[dtype][0]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        # blanks to a multiple of 8, so that the data behind it is aligned for whoever maps the file
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + offset
        for name, dtype, _ in shard:
            begin, end = entries[name]["data_offsets"]
            places[name] = Place(file, dtype, len(headers[file]) + begin, end - begin)
    if len(places) < len(tensors):
        raise ValueError("a tensor's name occurs twice in the layout")
    return Layout(headers, sizes, places)


class Writer:
    """Files of a layout under ``NAME.part``, at full size from the start, so that a full disk shows before any work.

    Args:
        resume: the folder is what an earlier writer of this layout left behind; its files are kept. Without it, a folder
            that holds a model, or parts of one, is refused.

    Raises:
        UserError: too little space, a folder that is not writable or not this layout's.
    """

    def __init__(self, folder: Path, layout: Layout, resume: bool = False) -> None:
        self.folder, self.layout = folder, layout
        self._streams: dict[str, BinaryIO] = {}
        self._closing = ExitStack()
        with ExitStack() as undo, _explained(folder, layout.total):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _kept(folder, layout, resume)
            missing = [file for file in layout.headers if file not in kept]
            # asked even where space is reserved below: a file system without posix_fallocate would fail hours later
            if shutil.disk_usage(folder).free < sum(layout.sizes[file] for file in missing):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            (folder / INDEX).unlink(missing_ok=True)  # what an earlier writer finished becomes parts again, index first
            for file, path in kept.items():
                path.replace(folder / (file + _PART))
            for file in missing:
                # before the file is made: an error halfway through must not leave one
                undo.callback((folder / (file + _PART)).unlink, missing_ok=True)
                _create(folder / file, layout.sizes[file], layout.headers[file])
            for file in layout.headers:
                # unbuffered: pwrite goes past Python's buffers anyway
                self._streams[file] = self._closing.enter_context((folder / (file + _PART)).open("r+b", buffering=0))
            # all there: nothing is undone any more
            undo.pop_all()

    def write(self, name: str, first: int, data: Tensor) -> None:
        """Write values of the tensor's type from flat element ``first`` on.

        Args:
            data: on the CPU, any shape; its values in row-major order.

        Raises:
            UserError: the disk is full or fails.
            ValueError: another type, or values beyond the tensor's end.
        """
        import torch

        place = self.layout.places[name]
        size, kind = KINDS[place.dtype]
        # as bytes: numpy has no bfloat16
        view = memoryview(data.reshape(-1).contiguous().view(torch.uint8).numpy())
        if data.dtype != getattr(torch, kind) or not 0 <= first * size <= first * size + len(view) <= place.nbytes:
            raise ValueError(f"{name}: {data.numel()} {data.dtype} from {first} on, planned {place.nbytes // size} {kind}")
        self.put(name, first * size, view)

    def put(self, name: str, start: int, view: memoryview) -> None:
        """Write bytes at byte ``start`` of a tensor's place, as they are.

        Raises:
            UserError: the disk is full or fails.
            ValueError: bytes beyond the place's end.
        """
        place = self.layout.places[name]
        if not 0 <= start <= start + view.nbytes <= place.nbytes:
            raise ValueError(f"{name}: {view.nbytes} bytes from {start} on, planned {place.nbytes}")
        self.put_at(place.file, place.start + start, view)

    def put_at(self, file: str, offset: int, view: memoryview) -> None:
        """Write bytes at a place of a file."""
        handle = self._streams[file].fileno()
        with _explained(self.folder, self.layout.total):
            while view:
                # a write may be short; at a given place, so that workers need no lock on a position
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written

    def checksum(self, name: str) -> int:
        """Adler-32 of the bytes that are in a tensor's place now."""
        # Adler-32 starts at 1; it need only tell torn writes, not an enemy's
        place, total, checked = self.layout.places[name], 1, 0
        handle = self._streams[place.file].fileno()
        with _explained(self.folder, self.layout.total):
            while checked < place.nbytes:
                block = os.pread(handle, min(_BLOCK, place.nbytes - checked), place.start + checked)
                if not block:
                    raise UserError(f"{self.folder / place.file}{_PART}: was cut short by something else; delete its folder")
                total, checked = zlib.adler32(block, total), checked + len(block)
        return total

    def finish(self) -> None:
        """Flush to disk, then give the files their names, the index last.

        Raises:
            UserError: the disk is full or fails; no index, or no file of a single one, bears its final name then.
        """
        with _explained(self.folder, self.layout.total):
            for stream in self._streams.values():
                # data before names: after a power cut a final name must not stand over holes
                os.fsync(stream.fileno())
            self.close()
            for file in self.layout.headers:
                (self.folder / (file + _PART)).replace(self.folder / file)
            _flush_folder(self.folder)
            if len(self.layout.headers) > 1:
                # last: without an index shards are no model, so a reader never sees half of one
                self._write_index()

    def close(self) -> None:
        self._closing.close()

    def _write_index(self) -> None:
        places = self.layout.places
        index = {"metadata": {"total_size": sum(place.nbytes for place in places.values())},
                 "weight_map": {name: places[name].file for name in sorted(places)}}
        part = self.folder / (INDEX + _PART)
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(index, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self.folder / INDEX)
        _flush_folder(self.folder)


def _kept(folder: Path, layout: Layout, resume: bool) -> dict[str, Path]:
    """The layout's files that an earlier writer left in the folder, finished or as parts.

    Raises:
        UserError: something else is there, or anything without ``resume``.
    """
    # .new files are ours and not whole: ``_create`` makes them again
    there = {path.name for path in folder.glob("model*.safetensors*") if path.suffix != _NEW}
    there |= {name for file in layout.headers for name in (file, file + _PART) if (folder / name).is_file()}
    if there and not resume:
        raise UserError(f"{folder}: holds {min(there)} already; move it away or write to another folder")
    ours = {file: folder / name for file in layout.headers for name in (file, file + _PART) if name in there}
    strange = [folder / name for name in there - {path.name for path in ours.values()} - {INDEX, INDEX + _PART}]
    for file, path in ours.items():
        header = layout.headers[file]
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != layout.sizes[file] or stream.read(len(header)) != header:
                strange.append(path)
    if strange:
        raise UserError(*(f"{path}: is not what this run writes, so it cannot be resumed; move it away or write to another "
                          "folder" for path in sorted(strange)))
    return ours


@contextmanager
def _explained(folder: Path, needed: int) -> Iterator[None]:
    """What the disk refuses, as a message that names the folder and the bytes."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(f"{folder}: a file of it: {os_advice(error.errno)}") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: cannot be written ({error.strerror}); point --output_dir at a folder that you may "
                            "write to") from None
        raise UserError(f"{folder}: the disk is full: {needed} bytes are needed, {shutil.disk_usage(folder).free} are free; "
                        "free some space or point --output_dir at another disk, then run the same command") from None


def _create(path: Path, size: int, header: bytes) -> None:
    """``path.part`` with its header and full size; it appears whole, so that a kill leaves none that resume would refuse."""
    new = path.with_name(path.name + _NEW)
    try:
        with new.open("wb", buffering=0) as stream:
            _reserve(stream.fileno(), size)
            # where nothing could be reserved the file still gets its size, as a hole
            os.truncate(stream.fileno(), size)
            stream.write(header)
        new.replace(path.with_name(path.name + _PART))
    finally:
        new.unlink(missing_ok=True)


def _reserve(handle: int, size: int) -> None:
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)  # macOS has none
    try:
        if reserve:
            reserve(handle, 0, size)
    except OSError as error:
        if error.errno not in _NO_RESERVE:
            raise


def _flush_folder(folder: Path) -> None:
    """Make renames outlast a power cut."""
    # a rename is an entry of its folder, and that is what must reach the disk
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
