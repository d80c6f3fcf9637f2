"""Read, compute, write: run a plan's jobs inside its memory promise, on several workers, resumable by tensor.

Each worker takes one tensor at a time and walks it in fixed blocks through buffers that it keeps. Nothing is held between
tensors, so peak memory is workers x buffers, whatever the models' sizes. The bytes written depend on the plan alone, not
on the number of workers.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import console
from errors import UserError
from models.checkpoints.reader import KINDS
from models.checkpoints.writer import Writer
from models.merging.methods import Method
from models.merging.plan import Job, Piece
from models.merging.prepare import PREPARE
from models.merging.tokens.rows import fill
from models.operators.blocks import Block, Undefined
from models.operators.noise import uniform
from models.operators.spans import spans

log = logging.getLogger(__name__)
JOURNAL = "finished.txt"
Walk = Callable[[Callable[["FileBlocks"], Any]], dict[str, Any]]


class Buffers(threading.local):
    """A worker's memory, grown to the largest block and then reused: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self.raw = torch.empty(0, dtype=torch.uint8)
        self.floats: list[Tensor] = []

    def bytes(self, count: int) -> Tensor:
        if len(self.raw) < count:
            self.raw = torch.empty(count, dtype=torch.uint8)
        return self.raw

    def float(self, which: int, count: int) -> Tensor:
        while len(self.floats) <= which:
            self.floats.append(torch.empty(0))
        if len(self.floats[which]) < count:
            self.floats[which] = torch.empty(count)
        return self.floats[which][:count]


class FileBlocks:
    """The blocks of one job, read from its checkpoints; the twin of ``blocks.MemoryBlocks``.

    Raises:
        UserError: while walking, an input holds NaN or infinity (checked on the first walk).
    """

    def __init__(self, job: Job, buffers: Buffers, seed: int, device: torch.device) -> None:
        self.job, self.buffers, self.seed, self.device = job, buffers, seed, device
        self.shape, self.checked = job.shape, False
        self.means: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Block]:
        for first, shape in spans(self.job.shape, self.job.by_rows):
            # every input has a buffer of its own; the next block overwrites them all
            values = [self._read(i, piece, first, shape) for i, piece in enumerate(self.job.pieces)]
            # only the inputs together can say what a row that one of them lacks should be
            if (rows := self.job.tokens) is not None:
                fill(rows, [piece.model for piece in self.job.pieces], values, first // shape[1], self._row,
                     partial(self._mean, rows.tokens))
            elif any(piece.rows is not None for piece in self.job.pieces):
                _fill_missing(self.job, values, first, shape)
            values = [block.to(self.device) for block in values]
            yield Block(first, None if self.job.base is None else values[0], values[len(values) - len(self.job.experts):])
        self.checked = True

    def uniform(self, which: int, block: Block) -> Tensor:
        like = block.experts[which]
        return uniform(self.seed, self.job.name, which, block.first, like.numel()).view(like.shape).to(like.device)

    def _read(self, which: int, piece: Piece, first: int, shape: tuple[int, ...]) -> Tensor:
        count = prod(shape)
        out = self.buffers.float(which, count).view(shape)
        if piece.rows is None:
            out.view(-1).copy_(self._values(piece, first, count))
        else:
            top = first // shape[1]
            self._read_rows(piece, piece.rows[top:top + shape[0]], out)
        # a finite sum proves every value finite, in one pass; the exact look is for the rare other case
        if not self.checked and not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
            place = int((~torch.isfinite(out.view(-1))).nonzero()[0]) + first
            raise UserError(f"{piece.info.file}: tensor {piece.info.name}: NaN or infinity at element {place}; "
                            "a merge would spread it; save the checkpoint again or leave this input out")
        return out

    def _values(self, piece: Piece, first: int, count: int) -> Tensor:
        raw = self.buffers.bytes(count * KINDS[piece.info.dtype][0])
        return piece.checkpoint.read(piece.info, first, count, raw)

    def _row(self, which: int, row: int) -> Tensor:
        """One row of an input, by its own number."""
        piece = self.job.pieces[which]
        columns = piece.info.shape[1]
        return self._values(piece, row * columns, columns).float()

    def _mean(self, tokens: int, which: int) -> Tensor:
        """The mean of an input's rows that have a token, completed as they are: one more walk, made once per tensor."""
        if not self.means:
            totals: dict[int, Tensor] = {}
            # in blocks of their own: the ones that wait for the mean must keep their buffers
            inner = FileBlocks(replace(self.job, shape=(tokens, self.job.shape[1])), Buffers(), self.seed, self.device)
            for block in inner:
                parts = block.experts if block.base is None else [block.base, *block.experts]
                for i, part in enumerate(parts):
                    totals[i] = totals.get(i, 0) + part.sum(0, dtype=torch.float64).cpu()
            self.means = {i: (total / tokens).float() for i, total in totals.items()}
        return self.means[which]

    def _read_rows(self, piece: Piece, wanted: np.ndarray, out: Tensor) -> None:
        """The input's rows ``wanted``, (rows,), read run by run of neighbours; those that it lacks: 0 until filled."""
        start, columns = 0, out.shape[1]
        while start < len(wanted):
            stop = start + 1
            # neighbours in the input make one read; of missing rows (-1) the run goes on while the number stays
            while stop < len(wanted) and wanted[stop] == wanted[stop - 1] + (wanted[start] >= 0):
                stop += 1
            if wanted[start] < 0:
                out[start:stop] = 0
            else:
                values = self._values(piece, int(wanted[start]) * columns, (stop - start) * columns)
                out[start:stop].view(-1).copy_(values)
            start = stop


def _fill_missing(job: Job, inputs: list[Tensor], first: int, shape: tuple[int, ...]) -> None:
    """A row that an input lacks takes the base's (or first input's) row; if that is missing too, the mean of the others."""
    row = first // shape[1]
    absent = [torch.zeros(shape[0], dtype=torch.bool) if piece.rows is None
              else torch.from_numpy(piece.rows[row:row + shape[0]] < 0) for piece in job.pieces]
    for r in torch.stack(absent).any(0).nonzero().flatten().tolist():
        known = [values[r] for values, gone in zip(inputs, absent, strict=True) if not gone[r]]
        if absent[0][r]:
            inputs[0][r] = torch.stack(known).mean(0) if known else 0
        for values, gone in zip(inputs[1:], absent[1:], strict=True):
            if gone[r]:
                values[r] = inputs[0][r]


def execute(jobs: tuple[Job, ...], method: Method, writer: Writer, folder: Path, *, workers: int, seed: int,
            device: torch.device, progress: bool = True, said: str = "merging") -> int:
    """Run every job that the journal in ``folder`` does not hold as finished; returns how many were run.

    A finished tensor is journaled with a checksum of its bytes and read back on resume: what a crash tore is done again.

    Raises:
        UserError: an input holds NaN or infinity, or a result leaves the range of the output's type.
    """
    buffers, lock = Buffers(), threading.Lock()
    finished = _finished(jobs, folder / JOURNAL, writer)
    left = [job for job in jobs if job.name not in finished]
    if finished:
        log.info("resuming: %d of %d tensors are finished", len(finished), len(jobs))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread per worker: tensors are the unit of parallel work
    stop = threading.Event()
    total = sum(prod(job.shape) for job in left)
    bar = tqdm(total=total, unit="weight", unit_scale=True, desc=said, **console.bar(progress))

    def blocks(job: Job) -> FileBlocks:
        return FileBlocks(job, buffers, seed, device)

    def run(job: Job, context: Any, journal: Any) -> None:
        checksum, first = 1, 0
        for fused in _told(job, _results(job, method, blocks(job), context)):
            # another worker failed: its error is the one to show, and no time goes into what will be thrown away
            if stop.is_set():
                return
            data = _stored(job, fused)
            writer.write(job.name, first, data)
            # adler32 finds a torn write, which is all it must, and is the cheapest that does
            checksum = zlib.adler32(_bytes(data), checksum)
            first += data.numel()
            bar.update(data.numel())
        # one line per tensor and flushed: a line in the journal is a tensor on the disk
        with lock:
            journal.write(f"{checksum:08x} {job.name}\n")
            journal.flush()

    def walk(function: Callable[[FileBlocks], Any]) -> dict[str, Any]:
        numeric = [job for job in jobs if not job.copied]
        with ThreadPoolExecutor(workers) as pool:
            return dict(zip([j.name for j in numeric], pool.map(lambda j: function(blocks(j)), numeric), strict=True))

    try:
        prepare = PREPARE.get(method.function[1])
        contexts = prepare(jobs, walk) if prepare and left else {}
        # a large tensor at the end would leave every other worker idle
        largest_first = sorted(left, key=lambda job: (-prod(job.shape), job.name))
        with (folder / JOURNAL).open("a", encoding="utf-8") as journal, ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(run, job, contexts.get(job.name), journal) for job in largest_first]
            try:
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
            except BaseException:
                stop.set()
                # Ctrl-C comes through here as well: nothing may go on writing
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
        bar.close()
    return len(left)


def _told(job: Job, results: Iterator[Tensor]) -> Iterator[Tensor]:
    """The results; what a method has no value for is said with the tensor's name."""
    try:
        yield from results
    except Undefined as error:
        raise UserError(f"{job.name}: {error}") from None


def _results(job: Job, method: Method, blocks: FileBlocks, context: Any) -> Iterator[Tensor]:
    if job.copied:
        return _copies(job)
    run = method.load()
    return run(blocks, job.parameters) if context is None else run(blocks, job.parameters, context)


def _copies(job: Job) -> Iterator[Tensor]:
    """The values that all inputs share: index buffers, of which a mean means nothing.

    Raises:
        UserError: an input has others; keeping the first's would be a choice that nobody made.
    """
    piece, size = job.experts[0], prod(job.shape)
    for first, (count,) in spans(job.shape, by_rows=False):
        values = [p.checkpoint.read(p.info, first, count,
                                    torch.empty(min(count, size) * KINDS[p.info.dtype][0], dtype=torch.uint8))
                  for p in (piece, *(p for p in job.pieces if p is not piece))]
        for other, read in zip((p for p in job.pieces if p is not piece), values[1:], strict=True):
            if not torch.equal(values[0], read):
                raise UserError(f"{job.name}: {job.dtype} values, which are no weights to merge, differ between "
                                f"{piece.info.file} and {other.info.file}; merge models that share them")
        yield values[0]


def _stored(job: Job, fused: Tensor) -> Tensor:
    """The block in the output's type, on the CPU.

    Raises:
        UserError: a finite fp32 result is beyond the type's range (fp16 ends at 65504).
    """
    if job.copied:
        return fused
    # the one rounding of a merge: everything before it was fp32
    data = fused.reshape(-1).to(getattr(torch, KINDS[job.dtype][1])).cpu()
    if job.dtype == "F16" and not torch.isfinite(data).all():
        raise UserError(f"{job.name}: the result is beyond float16's range; use --out_dtype bfloat16 or float32")
    return data


def _bytes(data: Tensor) -> memoryview:
    return memoryview(data.contiguous().view(torch.uint8).numpy())


def _finished(jobs: tuple[Job, ...], journal: Path, writer: Writer) -> set[str]:
    """Names of the journaled tensors whose bytes are still what was journaled."""
    if not journal.is_file():
        return set()
    known: Mapping[str, Job] = {job.name: job for job in jobs}
    intact = set()
    for line in journal.read_text(encoding="utf-8").splitlines():
        checksum, _, name = line.partition(" ")
        # a line that the kill cut short names no tensor, or has a checksum that cannot match
        if name in known and f"{writer.checksum(name):08x}" == checksum:
            intact.add(name)
    return intact
