"""Asks an OpenAI-compatible chat endpoint: many at once, bounded retries, a cost cap, every paid reply kept on disk.

The ``openai`` package sends; its own retries are off, because a damaged body that came with status 200 must be tried
again too, a rate limit must hold back every worker, and each try must be counted against the cap.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluator.judges import api_wire
from evaluator.judges.api_limits import Account, CapReached, Gate, Stopped, backoff, window_left
from evaluator.judges.api_wire import Fault, Reply
from evaluator.judges.cache import Cache, key
from evaluator.judges.protocol import Item, Verdict
from flags.judge_flags import is_loopback

if TYPE_CHECKING:
    from flags.judge_flags import ApiFlags

log = logging.getLogger(__name__)
#: A chat message: {"role": ..., "content": ...}.
Message = dict[str, str]
#: Requests in a row that may use up their tries before the endpoint counts as gone.
GIVE_UP = 20
_OPTIONAL = ("seed", "temperature", "max_tokens")
#: Note of a kept reply that ended at the token limit.
_CUT = "cut"
_UNKNOWN_FIELD = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|extra|not permitted", re.I)


class Failed(Exception):
    """No reply, and why, in words without secrets."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask; equal endpoints share one client, hence one cost cap, within a process."""

    model: str
    base_url: str
    key_variable: str
    concurrency: int
    retries: int
    timeout: float
    max_tokens: int
    prices: tuple[float, float] | None
    max_cost: float
    seed: int
    replies: Path

    @classmethod
    def of(cls, args: ApiFlags) -> Endpoint:
        """The endpoint that a command's flags describe."""
        return cls(args.judge_model, args.judge_base_url, args.judge_key_variable, args.judge_concurrency,
                   args.judge_retries, args.judge_timeout, args.judge_max_tokens, args.prices, args.max_cost, args.seed,
                   args.results / "scores" / "api_replies.sqlite")


@functools.lru_cache(maxsize=8)
def client(endpoint: Endpoint) -> Client:
    """The one client of an endpoint in this process."""
    return Client(endpoint)


@dataclass(frozen=True)
class _Place:
    """Key of what an endpoint was found to refuse, beside the replies."""

    version: str
    name: str = "api-refused-fields"


class Client:
    """Asks one endpoint; safe with threads. Replies are kept under (endpoint, decoding, messages) and never paid twice."""

    name = "api-reply"

    def __init__(self, endpoint: Endpoint) -> None:
        import openai

        # one line per request belongs to nobody's screen
        for noisy in ("httpx", "httpx2", "openai"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.endpoint, self.account, self.gate = endpoint, Account(endpoint.prices, endpoint.max_cost), Gate()
        self._key = os.environ.get(endpoint.key_variable, "").strip()
        local = is_loopback(endpoint.base_url)
        self._openai = openai.OpenAI(
            api_key=self._key or "none", base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0,
            # a proxy of the environment cannot reach this machine's own ports
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )
        if self._key and not local and endpoint.base_url.startswith("http:"):
            log.warning("%s is not encrypted: the key and every answer can be read on the way", endpoint.base_url)
        self._decoding: dict[str, Any] = {"temperature": 0, "seed": endpoint.seed, "max_tokens": endpoint.max_tokens}
        self._lock, self._in_a_row, self._closed, self.cut = threading.Lock(), 0, "", 0
        self._asking: dict[bytes, threading.Lock] = {}
        self._disk, self._file, self._users = threading.Lock(), ExitStack(), 0
        self._refused: list[str] = []
        # a later process must not name fields, and look for replies, that the endpoint was found to refuse
        if endpoint.replies.is_file():
            with Cache(endpoint.replies) as kept:
                known = kept.get(self._place, Item("", ""))
            for name in json.loads(known.reason) if known else ():
                self._leave_out(name)

    @property
    def version(self) -> str:
        """Everything but the messages that a reply depends on; of the decoding fields, those that are sent."""
        where, sent = self.endpoint, self._decoding
        temperature = "temperature 0" if "temperature" in sent else "no temperature"
        seed = f"seed {where.seed}" if "seed" in sent else "no seed"
        return f"{where.model} at {where.base_url}, {temperature}, {seed}, {where.max_tokens} tokens"

    @property
    def _place(self) -> _Place:
        return _Place(f"{self.endpoint.model} at {self.endpoint.base_url}")

    def _leave_out(self, name: str) -> None:
        """Send no such field from now on, or its newer spelling."""
        self._refused.append(name)
        # the newer spelling of the same limit
        extra = {"max_completion_tokens": self.endpoint.max_tokens} if name == "max_tokens" else {}
        self._decoding = {k: v for k, v in self._decoding.items() if k != name} | extra

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the file of replies open; ``ask`` works inside only.

        Raises:
            UserError: the file cannot be used.
        """
        with self._disk:
            if not self._users:
                self._kept = self._file.enter_context(Cache(self.endpoint.replies))
            self._users += 1
        try:
            yield
        finally:
            with self._disk:
                self._users -= 1
                if not self._users:
                    self._file.close()

    def ask(self, messages: list[Message], stop: threading.Event) -> Reply:
        """The reply to a conversation: from an earlier run if there is one, else from the endpoint, kept before it returns.

        Raises:
            Failed: every try gave nothing, the cost cap or a closed endpoint allows none, or ``stop`` is set.
        """
        item = Item(json.dumps(messages, ensure_ascii=False), "")
        with self._lock:
            # the same pair in both directions gives equal requests: the second waits for the first one's reply
            asking = self._asking.setdefault(key(self, item), threading.Lock())
        with asking:
            with self._disk:
                old = self._kept.get(self, item)
            if old:
                reply = Reply(old.reason, None, None, old.note == _CUT)
            else:
                reply = self._ask_endpoint(messages, stop)
                with self._disk:
                    # under the version by now: fields that were refused on the way were not part of it
                    self._kept.put(self, item, Verdict(None, reason=reply.text, note=_CUT if reply.cut else ""))
            if reply.cut:
                with self._lock:
                    self.cut += 1
            return reply

    def _ask_endpoint(self, messages: list[Message], stop: threading.Event) -> Reply:
        most, fault = self._most(messages), Fault("not asked")
        for attempt in range(self.endpoint.retries + 1):
            if self._closed:
                raise Failed(self._closed)
            try:
                self.gate.wait(stop)
                self.account.reserve(most, stop)
            except CapReached as cap:
                raise Failed(str(cap)) from None
            except Stopped:
                raise Failed("stopped before it was asked") from None
            try:
                reply = self._one_try(messages, most)
            except Fault as found:
                fault = found
            else:
                # in a row: an endpoint that answers now and then is slow, not gone
                self._in_a_row = 0
                return reply
            # for every worker: the next request would hear the same
            if fault.hopeless:
                self._close(str(fault))
            if not fault.again:
                raise Failed(str(fault))
            if fault.wait is not None:
                self.gate.pause(fault.wait)
            if attempt < self.endpoint.retries:
                stop.wait(backoff(attempt, f"{self.endpoint.seed}/{messages[-1]['content']}"))
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= GIVE_UP:
                self._close(f"{GIVE_UP} requests in a row failed, last: {fault}")
        raise Failed(f"{fault} ({self.endpoint.retries + 1} tries)")

    def _one_try(self, messages: list[Message], most: float) -> Reply:
        """Send once (again at once without a field that the endpoint does not know) and settle what it cost."""
        spent, read, written = 0.0, 0, 0
        try:
            reply = self._send(messages)
            if reply.read is None or reply.written is None:
                spent = most
            else:
                spent, read, written = self.account.price(reply.read, reply.written), reply.read, reply.written
            return reply
        except Fault as fault:
            # a reply lost on the way may be on the bill: count the most that it can have cost
            spent = most if fault.paid else 0.0
            raise
        except BaseException:
            spent = most
            raise
        finally:
            self.account.settle(most, spent, read, written)

    def _send(self, messages: list[Message]) -> Reply:
        import httpx2  # the openai package's transport
        import openai

        while True:
            decoding = self._decoding
            try:
                # streamed, so that the limit on time and size holds for the whole body
                with self._openai.chat.completions.with_streaming_response.create(
                    model=self.endpoint.model, messages=messages, **decoding,  # type: ignore[arg-type]
                ) as response:
                    self.gate.pause(window_left(response.headers))
                    reply = api_wire.reply(api_wire.body(response.iter_bytes(), self.endpoint.timeout))
                    return replace(reply, text=self._clean(reply.text))
            except openai.APIStatusError as error:
                if not self._forget_field(error, decoding):
                    raise api_wire.refusal(error, self._clean) from None
            except (openai.APIConnectionError, httpx2.HTTPError) as error:
                cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
                unsent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
                late = isinstance(cause, httpx2.TimeoutException)
                text = f"no reply in {self.endpoint.timeout:g} s" if late else (
                    f"connection to {self.endpoint.base_url}: {type(cause).__name__}")
                raise Fault(self._clean(text), again=True, paid=not unsent) from None
            except openai.OpenAIError as error:
                raise Fault(f"openai: {type(error).__name__}", paid=True) from None

    def _forget_field(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether the endpoint refused an optional field, which is left out (or respelt) from now on."""
        if error.status_code not in (400, 422):
            return False
        text = str(error.message)
        names = [name for name in _OPTIONAL if name in sent and (error.param == name or (
            re.search(rf"\b{name}\b", text) and _UNKNOWN_FIELD.search(text)))]
        if not names:
            return False
        with self._lock:
            # another worker may have left it out meanwhile
            if names[0] in self._decoding:
                self._leave_out(names[0])
                log.warning("%s takes no %s: asked without it", self.endpoint.model, names[0])
                with self._disk:
                    self._kept.put(self._place, Item("", ""), Verdict(None, reason=json.dumps(self._refused)))
        return True

    def _most(self, messages: list[Message]) -> float:
        """The most that a request can cost: a token is at least a byte, templates add some, a reply keeps its limit."""
        # with room for each message's marks (32) and for the template around them (64)
        read = sum(len(message["content"].encode()) + 32 for message in messages) + 64
        return self.account.price(read, self.endpoint.max_tokens)

    def _close(self, reason: str) -> None:
        if not self._closed:
            self._closed = reason
            log.warning("%s asks no more: %s", self.endpoint.model, reason)

    def _clean(self, text: str) -> str:
        """A text from outside without the key, in case the endpoint repeats it."""
        return text.replace(self._key, "***") if self._key else text
