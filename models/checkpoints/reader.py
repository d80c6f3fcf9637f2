"""Model folders of safetensors files: checked as hostile input, values read by position into reused buffers.

A merge reads blocks, not tensors, and a file that lies (sizes, overlaps, paths) must be refused by name before anything is
written. Loads no torch until it reads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import manifest
from errors import UserError
from models.checkpoints.header import KINDS, MAX_HEADER, REPAIR, TensorInfo, few, parse_object, read_header, shown
from models.checkpoints.kinds import other_kind, packed_problem

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
#: Bytes that are compared at once.
_COMPARED = 1 << 23
_SUFFIX = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Checkpoint:
    """An open model folder, or one file. Reads are thread safe; close it, or use it as a context manager.

    Args:
        files: the weight files, in order.
        tensors: by name, sorted.
        metadata: what the files' headers say about themselves.
        config: its config.json, empty when it has none.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: dict[str, Any]
    _streams: dict[Path, BinaryIO] = field(repr=False)
    _closing: ExitStack = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read headers, index and configuration of a folder or a .safetensors file; no values.

        Raises:
            UserError: with everything that is wrong: nothing there, only pickled weights, damaged or lying files.
        """
        # all shards are looked at before anything is raised: one bad download is often several
        problems: list[str] = []
        files: tuple[Path, ...] = ()
        placed: dict[str, str] | None = None
        config: dict[str, Any] = {}
        streams: dict[Path, BinaryIO] = {}
        shards: dict[str, dict[str, TensorInfo]] = {}
        metadata: dict[str, str] = {}
        with ExitStack() as stack:
            with _collecting(problems, folder):
                files, placed = _weights(folder, problems)
            for file in files:
                with _collecting(problems, file):
                    streams[file] = stack.enter_context(_opened(file))
                    shards[file.name], own_metadata = read_header(streams[file], file)
                    metadata |= own_metadata
            tensors = _together(folder, shards, problems)
            if placed is not None:
                problems += _against_index(folder / INDEX, placed, shards)
            # a single file takes the config.json beside it
            root = folder.parent if folder in files else folder
            # lexists: a link to nothing is a fault to report, not a file that is missing
            if os.path.lexists(root / CONFIG):
                with _collecting(problems, root / CONFIG):
                    config = _json(root / CONFIG)
            if problems:
                raise UserError(*problems)
            # stack.pop_all(): from here on the checkpoint closes the files; until here any error did
            return cls(root, files, dict(sorted(tensors.items())), metadata, config, streams, stack.pop_all())

    def read(self, info: TensorInfo, first: int, count: int, out: Tensor) -> Tensor:
        """Elements first .. first + count of a tensor's flat values.

        Args:
            out: (bytes,) uint8 buffer on the CPU, at least as long as what is read; the result is a view of it.

        Raises:
            UserError: the file ends early or cannot be read.
            ValueError: the elements are not all in the tensor, or ``out`` is too short.
        """
        import torch

        size, kind = KINDS[info.dtype]
        # checked though only our code calls it: a read past the end would be the next tensor's values
        nbytes, offset = count * size, first * size
        if not 0 <= offset <= offset + nbytes <= info.nbytes or nbytes > len(out):
            raise ValueError(f"{info.name}: {count} elements from {first} of {prod(info.shape)}, {len(out)} bytes to fill")
        view, filled = memoryview(out.numpy())[:nbytes], 0
        handle = self._streams[info.file].fileno()
        # a read may stop early (a signal, a network file system); preadv keeps no position, so threads can share the file
        while filled < nbytes:
            try:
                got = os.preadv(handle, [view[filled:]], info.start + offset + filled)
            except OSError as error:
                raise _unreadable(info.file, error) from None
            if not got:
                raise UserError(f"{info.file}: ends {nbytes - filled} bytes too early in tensor {shown(info.name)}, though "
                                f"it was whole when it was opened; let nothing write to it, or {REPAIR}")
            filled += got
        return out[:nbytes].view(getattr(torch, kind))

    def plain(self) -> Checkpoint:
        """This checkpoint, if its weights are numbers that can be added up.

        Raises:
            UserError: they are quantised or packed.
        """
        if problem := packed_problem(self.folder, self.tensors, self.config):
            raise UserError(problem)
        return self

    def equal(self, one: TensorInfo, two: TensorInfo) -> bool:
        """Whether two tensors of this checkpoint have the same type, shape and bytes."""
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        handles = [self._streams[info.file].fileno() for info in (one, two)]
        for first in range(0, one.nbytes, _COMPARED):
            count = min(_COMPARED, one.nbytes - first)
            parts = [os.pread(handle, count, info.start + first) for handle, info in zip(handles, (one, two), strict=True)]
            if parts[0] != parts[1]:
                return False
        return True

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of the whole file.

        Raises:
            UserError: a file cannot be read.
        """
        digests: dict[str, str] = {}
        problems: list[str] = []
        for file in self.files:
            with _collecting(problems, file):
                digests[file.name] = manifest.sha256(file)
        if problems:
            raise UserError(*problems)
        return digests

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weights(folder: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files of a folder, and the index's map of tensor to file (None without an index)."""
    if not folder.is_dir():
        if folder.suffix == _SUFFIX and os.path.lexists(folder):
            return (folder,), None
        if folder.exists() and (kind := other_kind(folder)):
            raise UserError(kind)
        what = _pickle_advice(folder.name) if folder.suffix in _PICKLED and folder.exists() else \
            f"no such model; give a folder that holds {SINGLE} or {INDEX}, or a {_SUFFIX} file"
        raise UserError(f"{folder}: {what}")
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single):
        if os.path.lexists(index):
            log.info("%s: holds %s and an index of shards; the single file is read, as transformers does", folder, SINGLE)
        return (single,), None
    if os.path.lexists(index):
        return _indexed(index, problems)
    names = sorted(path.name for path in folder.iterdir())
    if kind := other_kind(folder):
        raise UserError(kind)
    loose = [name for name in names if name.endswith(_SUFFIX)]
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if loose:
        raise UserError(f"{folder}: holds {shown(loose)}, but neither {SINGLE} nor {INDEX}; a shard may be missing: "
                        "download the index too, or give the path of the one file")
    raise UserError(f"{folder}: holds no {_SUFFIX} file, " + (
        f"only {shown(pickled[0])}: {_pickle_advice(str(folder))}" if pickled else "give a folder that does"))


def _pickle_advice(source: str) -> str:
    return ("pickled weights may run code when they are read and are refused; convert them where that does no harm: "
            f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained('NEW') writes {_SUFFIX}")


def _indexed(index: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    placed = _json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: weight_map is {shown(placed)}, must map tensors to files; {REPAIR}")
    # an index lists a file once for each of its tensors
    names = sorted(set(placed.values()))
    wrong = {name: fault for name in names if (fault := _name_fault(index.parent, name))}
    problems += few(index, (f"names {shown(name)}, {fault}" for name, fault in wrong.items()))
    return tuple(index.parent / name for name in names if name not in wrong), placed


def _name_fault(folder: Path, name: str) -> str | None:
    # a link may lead elsewhere (the hub's cache is made of links), a name may not
    if "/" in name or "\\" in name or not name.isprintable() or not name.endswith(_SUFFIX):
        return f"allowed are plain names of {_SUFFIX} files beside it"
    return None if os.path.lexists(folder / name) else "which is not in the folder"


def _together(folder: Path, shards: Mapping[str, dict[str, TensorInfo]], problems: list[str]) -> dict[str, TensorInfo]:
    """The tensors of all files; one that is in two of them, or none at all, is a problem."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards.values():
        problems += few(folder, (f"tensor {shown(name)} is in {tensors[name].file.name} and in {info.file.name}"
                                 for name, info in shard.items() if name in tensors))
        tensors |= shard
    if not tensors and not problems:
        problems.append(f"{folder}: holds no tensors; {REPAIR}")
    return tensors


def _against_index(index: Path, placed: Mapping[str, str], shards: Mapping[str, dict[str, TensorInfo]]) -> list[str]:
    """Tensors that the index and the shards that could be read disagree about."""
    lost = [f"{shown(name)} in {file}" for name, file in placed.items() if file in shards and name not in shards[file]]
    extra = [f"{shown(name)} in {file}" for file, tensors in shards.items() for name in tensors if name not in placed]
    return few(index, (f"{len(names)} tensors {what} (e.g. {', '.join(names[:3])})" for names, what in (
        (lost, "are not in the files that it names"), (extra, "of the files are not in it")) if names))


def _json(path: Path) -> dict[str, Any]:
    with _opened(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_HEADER:
            raise UserError(f"{path}: {size} bytes, allowed are {MAX_HEADER}; {REPAIR}")
        try:
            return parse_object(stream.read(MAX_HEADER))
        except ValueError as error:
            raise UserError(f"{path}: {error}; {REPAIR}") from None


def _opened(file: Path) -> BinaryIO:
    """A file open for reading; a pipe or device under its name would block or never end."""
    if not file.is_file():
        raise UserError(f"{file}: {'a link to nothing' if not file.exists() else 'not a regular file'}; {REPAIR}")
    return file.open("rb")


@contextmanager
def _collecting(problems: list[str], file: Path) -> Iterator[None]:
    """Go on after what the user can mend, and keep it for the report."""
    try:
        yield
    except UserError as error:
        problems += error.problems
    except OSError as error:
        problems += _unreadable(Path(error.filename or file), error).problems


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk, or {REPAIR}")
