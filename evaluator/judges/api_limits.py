"""What holds an API client back: money with a cap, pauses that the endpoint asks for, back-off between tries."""

from __future__ import annotations

import email.utils
import math
import random
import re
import threading
import time
from collections.abc import Mapping

#: Seconds. A longer wait than this is not waited for: the endpoint counts as closed.
LONGEST_PAUSE = 120.0
#: Seconds before the first retry and at most before any, unless the endpoint names a time.
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Stopped(Exception):
    """The run ends; nothing more is asked."""


class CapReached(Exception):
    """The next request could cost more than is left."""


class Account:
    """Tokens and money of one process, with a cap that holds for requests under way too.

    A request first reserves the most that it can cost and later settles what it did cost. One that does not fit waits for
    those under way, which mostly turn out cheaper, and is refused only if it does not fit even then.
    """

    def __init__(self, prices: tuple[float, float] | None, cap: float) -> None:
        self.spent, self.read, self.written, self.requests = 0.0, 0, 0, 0
        self._prices, self._cap, self._reserved = prices, cap, 0.0
        self._change = threading.Condition()

    def price(self, read: int, written: int) -> float:
        """Money for so many tokens; 0 without prices."""
        return (read * self._prices[0] + written * self._prices[1]) / 1e6 if self._prices else 0.0

    def reserve(self, most: float, stop: threading.Event) -> None:
        """Hold back ``most`` until ``settle``.

        Raises:
            CapReached: it does not fit under the cap.
            Stopped: the run ended meanwhile.
        """
        with self._change:
            # what is reserved may come back: wait for it; what is spent will not
            while self._cap and self.spent + self._reserved + most > self._cap:
                if self.spent + most > self._cap:
                    raise CapReached(f"cost cap {self._cap:g}: {self.spent:.6g} spent, the next request may cost {most:.3g}")
                # woken by settle; every fifth of a second for a stop, which notifies nobody
                self._change.wait(0.2)
                if stop.is_set():
                    raise Stopped
            self._reserved += most
            self.requests += 1

    def settle(self, reserved: float, spent: float, read: int = 0, written: int = 0) -> None:
        """Replace a reservation by what the request cost."""
        with self._change:
            self._reserved -= reserved
            self.spent += spent
            self.read += read
            self.written += written
            self._change.notify_all()


class Gate:
    """A pause that all workers share: after a rate limit none of them asks before its time."""

    def __init__(self) -> None:
        self._until = 0.0

    def pause(self, seconds: float) -> None:
        # the longest wins: a short pause of one reply must not lift the long one of another
        self._until = max(self._until, time.monotonic() + seconds)

    def wait(self, stop: threading.Event) -> None:
        """Sleep until the pause is over; Stopped if the run ends first."""
        while (left := self._until - time.monotonic()) > 0:
            if stop.wait(left):
                raise Stopped
        if stop.is_set():
            raise Stopped


def backoff(attempt: int, seed: str) -> float:
    """Seconds before try ``attempt`` + 1: doubled each time, times a seeded factor of 0.5 to 1, so that workers spread."""
    # 2 to the 30 at most, so that no number of retries overflows
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 30)) * random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a refusal asks to wait (Retry-After-Ms, Retry-After as seconds or date); None if it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):
        return None


def window_left(headers: Mapping[str, str]) -> float:
    """Seconds until a used-up window reopens (x-ratelimit-remaining-*: 0 with x-ratelimit-reset-*: 6m0s); 0 if none is."""
    waits = [seconds for kind in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"
             and (seconds := duration(headers.get(f"x-ratelimit-reset-{kind}", ""))) is not None]
    return min(max(waits, default=0.0), LONGEST_PAUSE)


def duration(text: str) -> float | None:
    """Seconds of "90", "1.5s", "20ms" or "1h6m0s"; None for anything else."""
    text = text.strip()
    if not re.fullmatch(rf"(?:{_PARTS.pattern})+", text):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in _PARTS.findall(text))
