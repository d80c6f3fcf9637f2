"""One command on several processes (torchrun, accelerate launch): who does what, and what the others found.

Every process holds a whole model on a device of its own; what they tell each other are small Python objects over gloo,
whatever computes. The first one writes, logs and shows progress. All processes make the same calls in the same order; alone,
each call is the plain thing. ``RANK`` and ``WORLD_SIZE`` are the launcher's; torch is imported where there are several.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import errors
from errors import LOST, UserError

#: How long a process waits for the others: the first may judge for hours by an endpoint while they wait for its verdicts.
_PATIENCE = datetime.timedelta(days=30)
#: The store of this launch, once joined: counters that all processes see.
_STORES: list[Any] = []
#: Numbers of the shared counters: the same in every process, for all make the same calls.
_COUNTERS = itertools.count()

Key = TypeVar("Key")
Unit = TypeVar("Unit")
Found = TypeVar("Found")


def count() -> int:
    """Processes of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The place of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Meet the other processes of the launch; all but the first fall silent. Alone, and at the second call, nothing.

    Raises:
        UserError: the launcher's variables are there in part, or the others do not come.
    """
    if count() == 1 or _STORES:
        return
    if rank():
        # what all of them find is said once; errors have their own rule (errors.py)
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore")
        # libraries' bars too; tqdm reads it at its first import
        os.environ["TQDM_DISABLE"] = "1"
    import torch.distributed as dist

    try:
        store, place, size = next(dist.rendezvous("env://"))
        # their own names in the launcher's store: gloo keeps its addresses there too
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=place, world_size=size,
                                timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"WORLD_SIZE={count()}: the processes of this launch do not meet ({said}); start the command by "
                        "torchrun or accelerate launch, or unset WORLD_SIZE for one process") from None
    _STORES.append(dist.PrefixStore("fusion", store))
    errors.TELLS.append(_first_to_tell)


def _first_to_tell() -> bool:
    try:
        return _counted("told") == 1
    except RuntimeError:  # the store went with the first process, which had its say
        return False


def _counted(name: str) -> int:
    """One more of a shared counter, from 1; RuntimeError where the store is gone.

    Without what torch's C++ side prints then: a screen of stack frames about an end that the process which ended has told.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return int(_STORES[0].add(name, 1))
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def agreed(make: Callable[[], Found]) -> Found:
    """What the first process makes, in all of them; the others do not make it."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    held: list[Any] = [make() if rank() == 0 else None]
    _together(lambda: dist.broadcast_object_list(held, src=0))
    return held[0]


def wait() -> None:
    """Go on when the first process has come here: what it wrote is there for all."""
    agreed(lambda: None)


def merged(part: Mapping[Key, Found]) -> dict[Key, Found]:
    """The entries of all processes, in all of them."""
    if count() == 1:
        return dict(part)
    import torch.distributed as dist

    held: list[Any] = [None] * count()
    _together(lambda: dist.all_gather_object(held, dict(part)))
    return {key: value for other in held for key, value in other.items()}


def divided(units: Iterable[Unit], compute: Callable[[Unit], Found]) -> list[Found]:
    """What ``compute`` makes of each unit, in order: every process its share, told to all at the end."""
    shares = (unit for unit in enumerate(units) if unit[0] % count() == rank())
    found = merged({place: compute(unit) for place, unit in shares})
    return [found[place] for place in sorted(found)]


def in_turns(units: Sequence[Unit], compute: Callable[[Unit], Found]) -> Iterator[tuple[Unit, Found]]:
    """(unit, what ``compute`` makes of it), in order, as they come: as many at a time as there are processes.

    For what is kept as it comes: a process that dies costs the units of that moment.
    """
    for start in range(0, len(units), count()):
        place = start + rank()
        found = merged({place: compute(units[place])} if place < len(units) else {})
        yield from ((units[at], found[at]) for at in sorted(found))


def claimed(n: int) -> Iterator[int]:
    """Numbers below ``n`` in order, each taken by one process, which comes back for the next when it is done with one.

    So that nobody waits for the process with the long answers.
    """
    if count() == 1:
        yield from range(n)
        return
    name = f"claims {next(_COUNTERS)}"
    while (number := _together(lambda: _counted(name)) - 1) < n:
        yield number


def _together(act: Callable[[], Found]) -> Found:
    try:
        return act()
    except RuntimeError as error:  # gloo's and the store's: the connection is gone, and with it the process
        raise UserError(LOST) from error
