"""What comes back from a chat endpoint: replies read with bounds, damage and refusals told apart. Knows no client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evaluator.judges.api_limits import LONGEST_PAUSE, retry_after, window_left

#: Bytes of a reply: far more than a verdict takes, so that a body without end has one.
_LARGEST_BODY = 4_000_000
#: Refusals that pass: timeout, conflict, too early, rate limit; beside these all of 500 and above.
_RETRIED = (408, 409, 425, 429)
#: Asking again, or asking anything else, gives the same: wrong key, no money, no such model or path.
_HOPELESS = (401, 402, 404, 405)


@dataclass(frozen=True)
class Reply:
    """What the endpoint said; token counts are None where it does not count. ``cut``: it ended at the token limit."""

    text: str
    read: int | None
    written: int | None
    cut: bool = False


class Fault(Exception):
    """One try that gave nothing: whether another may, after how long, and whether it may have been paid for."""

    def __init__(self, text: str, *, again: bool = False, hopeless: bool = False, wait: float | None = None,
                 paid: bool = False) -> None:
        super().__init__(text)
        self.again, self.hopeless, self.wait, self.paid = again, hopeless, wait, paid


def body(chunks: Iterable[bytes], timeout: float) -> bytes:
    """A whole body, or a Fault: the limits hold for drips too, each of which would be in time."""
    received, deadline = bytearray(), time.monotonic() + timeout
    for chunk in chunks:
        received += chunk
        if len(received) > _LARGEST_BODY:
            raise Fault(f"reply of more than {_LARGEST_BODY} bytes", paid=True)
        if time.monotonic() > deadline:
            raise Fault(f"no whole reply in {timeout:g} s", again=True, paid=True)
    return bytes(received)


def reply(body: bytes) -> Reply:
    """The text and token counts of a body; a damaged one may be whole the next time."""
    if not body.strip():
        raise Fault("empty reply", again=True, paid=True)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Fault("reply is not JSON", again=True, paid=True) from None
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = message["content"] if message["content"] is not None else message.get("refusal") or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise Fault("reply holds no message", again=True, paid=True)
    usage = content.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    # type, not isinstance: true is an int to Python and no count
    read, written = (n if type(n) is int and n >= 0 else None for n in counts)
    # half of a surrogate pair is valid JSON and no text: it could not be sent back in a re-ask
    return Reply(text.encode("utf-8", "replace").decode(), read, written, choice.get("finish_reason") == "length")


def refusal(error: Any, clean: Callable[[str], str]) -> Fault:
    """What an openai.APIStatusError means for this request and the next; ``clean`` takes secrets out of its words."""
    status, wait = error.status_code, retry_after(error.response.headers)
    message = error.body.get("message") if isinstance(error.body, dict) else None
    text = f"HTTP {status}" + (f": {clean(message)[:200]}" if isinstance(message, str) and message else "")
    again = status in _RETRIED or status >= 500
    if again and wait is not None and wait > LONGEST_PAUSE:
        return Fault(f"{text}; asks to wait {wait:.0f} s", hopeless=True)
    if status == 429:
        wait = max(wait or 0.0, window_left(error.response.headers)) or None
    hopeless = status in _HOPELESS or error.code == "insufficient_quota"
    return Fault(text, again=again and not hopeless, hopeless=hopeless, wait=wait if again else None)
