"""The header of a safetensors file, parsed as hostile input: every size, offset and name is checked before it is used.

A file that passes here is one that the safetensors package reads too; the other way round this is stricter, where leniency
would hide damage (a name given twice, unknown fields, names that would break a log line).
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError

#: safetensors' type names: bytes per element, and torch's name for it. Types of less than a byte are not among them.
KINDS = {
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"), "C64": (8, "complex64"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"), "BOOL": (1, "bool"),
    "U64": (8, "uint64"), "U32": (4, "uint32"), "U16": (2, "uint16"), "U8": (1, "uint8"),
}
REPAIR = "download or save the checkpoint again"
#: The safetensors package's own limit; also the limit of an index or a config, so that no file can fill the memory.
MAX_HEADER = 100_000_000
#: Bounds that no real tensor meets and that keep every product of sizes far inside 64 bits.
MAX_ELEMENTS = 1 << 48
MAX_DIMENSIONS = 64
_METADATA = "__metadata__"
#: How the text begins that Git LFS leaves in the place of a file.
_POINTER = b"version "
_FIELDS = ("dtype", "shape", "data_offsets")
#: A hostile header can hold a million faults; a person reads twenty.
_MOST_FAULTS = 20
#: Half a character, which JSON can spell but UTF-8 cannot.
_HALF = re.compile("[\ud800-\udfff]")
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = 120


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Args:
        dtype: a key of ``KINDS``.
        start: absolute byte offset in ``file``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(stream: BinaryIO, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file, by name, and its metadata.

    Raises:
        UserError: everything that is wrong with it.
        OSError: it cannot be read.
    """
    # of the open file, not of its name: another file may stand under the name by now
    size = os.fstat(stream.fileno()).st_size
    if size < 8:
        raise UserError(f"{file}: {size} bytes are no safetensors file, which starts with 8 bytes of length; {REPAIR}")
    # the length is checked before it is read: a claim of 2^63 bytes must not become a buffer
    head = stream.read(8)
    if head == _POINTER:
        raise UserError(f"{file}: a Git LFS pointer, which stands for the weights and is not them; fetch them with git lfs "
                        "pull, or download them again")
    length, most = int.from_bytes(head, "little"), min(MAX_HEADER, size - 8)
    if not 2 <= length <= most:
        raise UserError(f"{file}: its header claims {length} bytes; allowed in this file: 2 to {most}; {REPAIR}")
    text = stream.read(length)
    # as the format demands; JSON itself would allow blanks in front
    if not text.startswith(b"{"):
        raise UserError(f"{file}: its header starts with {shown(text[:8])}, not with a JSON object; {REPAIR}")
    try:
        header = parse_object(text)
    except ValueError as error:
        raise UserError(f"{file}: its header {error}; {REPAIR}") from None
    metadata, data = header.pop(_METADATA, {}), 8 + length
    # every entry first: the search for gaps trusts types and bounds
    if faults := few(file, _header_faults(metadata, header, size - data)):
        raise UserError(*faults)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, data + begin, end - begin)
    if faults := few(file, _gaps(tensors, data, size)):
        raise UserError(*faults)
    return tensors, metadata


def few(file: Path, faults: Iterable[str]) -> list[str]:
    """Faults as messages about a file: the first, and word of the rest, for a hostile file may have millions."""
    # one more than is shown, to know whether there are more; a generator, so that the others are never made
    messages = [f"{file}: {fault}; {REPAIR}" for fault in islice(faults, _MOST_FAULTS + 1)]
    return messages if len(messages) <= _MOST_FAULTS else [*messages[:_MOST_FAULTS], f"{file}: and more of this kind"]


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice.

    Raises:
        ValueError: it is none; the message continues a sentence that names the file.
    """
    # two parsers may each take another of two equal names: what one checks, the other loads
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    twice.append(key)
                seen.add(key)
        return members

    try:
        # an integer of -0 is none to the reference implementation, hence none here
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique,
                             parse_int=lambda digits: -0.0 if digits == "-0" else int(digits))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("is not usable JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"is not a JSON object but {shown(content)}")
    if twice:
        raise ValueError(f"names {', '.join(map(shown, twice[:3]))} twice")
    return content


def shown(value: Any) -> str:
    """A value out of a hostile file for a message: short, and without control characters."""
    return _SHOWN.repr(value)


def _header_faults(metadata: Any, entries: dict[str, Any], available: int) -> Iterator[str]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) and not _HALF.search(text)
                                                 for pair in metadata.items() for text in pair):
        yield f"{_METADATA} is {shown(metadata)}, must map texts to texts"
    for name, entry in entries.items():
        yield from (f"tensor {shown(name)}: {fault}" for fault in _faults(name, entry, available))


def _faults(name: str, entry: Any, available: int) -> Iterator[str]:
    """What is wrong with one tensor's entry; ``available``: bytes of data in its file."""
    if not name.isprintable():
        yield "its name holds control characters"
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
        yield f"its entry is {shown(entry)}, must have {', '.join(_FIELDS)} and nothing else"
        return
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    known = isinstance(dtype, str) and dtype in KINDS
    if not known:
        yield f"dtype {shown(dtype)} is not known; allowed: {', '.join(KINDS)}"
    counted = _is_shape(shape)
    if not counted:
        yield (f"shape {shown(shape)} is not a list of at most {MAX_DIMENSIONS} whole numbers from 0 on, of at most "
               f"{MAX_ELEMENTS} elements together")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        yield f"data_offsets {shown(offsets)} are not two whole numbers"
    elif not 0 <= offsets[0] <= offsets[1] <= available:
        yield (f"data_offsets {shown(offsets)} must rise and lie within the file's {available} bytes of data; "
               "a file that was cut short looks like this")
    elif known and counted and (span := offsets[1] - offsets[0]) != (needed := prod(shape) * KINDS[dtype][0]):
        yield f"shape {shown(shape)} of {dtype} needs {needed} bytes, data_offsets {shown(offsets)} span {span}"


def _is_shape(shape: Any) -> bool:
    """Whether this is a list of sizes whose product, zeros left out, is small enough: the product is never formed whole."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        return False
    elements = 1
    for size in shape:
        if type(size) is not int or size < 0:  # a bool is an int, but no size
            return False
        elements *= size or 1
        # at once: a product of 64 large sizes is never formed
        if elements > MAX_ELEMENTS:
            return False
    return True


def _gaps(tensors: dict[str, TensorInfo], data: int, size: int) -> Iterator[str]:
    """Where tensors overlap, leave holes, or end before the file does."""
    place = data
    # by place, empty tensors first: one of no bytes may stand where another begins
    for info in sorted(tensors.values(), key=lambda i: (i.start, i.nbytes)):
        if info.start < place:
            yield f"tensor {shown(info.name)}: overlaps the tensor before it by {place - info.start} bytes"
        elif info.start > place:
            yield f"tensor {shown(info.name)}: leaves a hole of {info.start - place} bytes before it"
        place = max(place, info.start + info.nbytes)
    if place < size:
        yield f"{size - place} bytes follow its last tensor"
