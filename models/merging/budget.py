"""What a merge costs before it starts: memory per worker, bytes moved, seconds at the bandwidth of this machine's disk."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from errors import UserError
from models.merging.methods import Method
from models.merging.plan import Job, MergePlan
from models.operators.spans import spans

#: Bytes moved to learn the disk's bandwidth: enough to outlast a seek, little to wait for.
_PROBE = 16 << 20
_READ = 8 << 20


@dataclass(frozen=True)
class Budget:
    """Workers, peak bytes beyond the interpreter, bytes moved and the least time that moving them takes."""

    workers: int
    peak_bytes: int
    bytes_read: int
    bytes_written: int
    read_per_second: float
    write_per_second: float

    @property
    def seconds(self) -> float:
        return self.bytes_read / self.read_per_second + self.bytes_written / self.write_per_second


def budget(plan: MergePlan, method: Method, memory_gb: float, asked: int, target: Path) -> Budget:
    """How many workers fit the promise, and what the merge will move.

    Raises:
        UserError: not even one worker fits; names the least that would.
    """
    # buffers grow to the largest block and stay: the largest job decides, not the mean
    each = max((worker_bytes(job) for job in plan.jobs), default=0)
    workers = asked or len(os.sched_getaffinity(0))
    if memory_gb:
        workers = min(workers, int(memory_gb * 2**30) // max(each, 1))
        if not workers:
            raise UserError(f"--memory_gb {memory_gb}: one worker needs {each / 2**30:.2f} GB for this recipe; "
                            f"give {each / 2**30 + 0.005:.2f} or more")
    read, write = _bandwidth(plan, target)
    reads = max((method.reads(job.parameters) for job in plan.jobs), default=method.walks)
    return Budget(workers, workers * each, reads * plan.bytes_in, plan.bytes_out, read, write)


def worker_bytes(job: Job) -> int:
    """Bytes that a worker's buffers and temporaries take at most for a job: held to by a test that measures."""
    largest = max((prod(shape) for _, shape in spans(job.shape, job.by_rows)), default=0)
    # fp32 per input, raw bytes of one, and temporaries: masks, bit patterns, sort keys (int64), draws, the heap's slack
    # the mean of the rows that have a token is taken in buffers of its own
    largest *= 2 if job.tokens is not None and job.tokens.tokens < job.tokens.rows else 1
    adapters = sum(getattr(piece.checkpoint, "extra_bytes", lambda _: 0)(piece.info) for piece in job.pieces)
    # what some parameters need beside blocks: sums for every vector along the first axis, all inputs at once in fp64
    along = 104 * prod(job.shape[1:]) if (getattr(job.parameters, "nuslerp_row_wise", False)
                                          and not job.parameters.nuslerp_flatten) else 0
    whole = 8 * len(job.pieces) * largest if getattr(job.parameters, "filter_wise", False) else 0
    return largest * (72 + 12 * len(job.pieces)) + along + whole + adapters + (2 << 20)


def _bandwidth(plan: MergePlan, target: Path) -> tuple[float, float]:
    """(read, write) bytes per second: 16 MB of the first input, 16 MB beside the output, synced and removed."""
    existing = next(folder for folder in (target, *target.parents) if folder.is_dir())
    source = plan.jobs[0].pieces[0].info.file
    start, bytes_read = time.perf_counter(), 0
    # unbuffered: Python's own copy would be timed with the disk
    with source.open("rb", buffering=0) as file:
        while bytes_read < _PROBE and (block := file.read(_READ)):
            bytes_read += len(block)
    read = max(bytes_read, 1) / max(time.perf_counter() - start, 1e-6)
    block = bytes(_READ)
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(_PROBE // _READ):
                file.write(block)
            # without it the page cache's speed would be taken for the disk's
            os.fdatasync(file.fileno())
            return read, _PROBE / (time.perf_counter() - start)
    except OSError:
        # too little space for a probe may be enough for the result; what is not, the writer says with its reason
        return read, read
