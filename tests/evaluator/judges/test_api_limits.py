"""What holds an API client back, and what comes back from the wire: pauses, back-off, caps, damaged bodies."""

from __future__ import annotations

import contextlib
import email.utils
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator.judges import api_limits, api_wire
from evaluator.judges.api_limits import Account, CapReached, Gate, Stopped, backoff, duration, retry_after, window_left


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("1.5s", 1.5), ("20ms", 0.02), ("6m0s", 360), ("1h6m0s", 3960), ("1d", 86400), ("", None), ("soon", None),
    ("5x", None), ("-1s", None),
])
def test_duration(text, seconds):
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_retry_after():
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after": "2", "retry-after-ms": "150"}) == pytest.approx(0.15)
    assert retry_after({"retry-after": "-3"}) == 0
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < retry_after({"retry-after": date}) <= 30
    assert retry_after({"retry-after": "inf"}) == float("inf")
    for headers in ({}, {"retry-after": "nan"}, {"retry-after": "soon"}):
        assert retry_after(headers) is None


def test_window_left():
    used = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s",
            "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "3s"}
    assert window_left(used) == 3
    assert window_left(used | {"x-ratelimit-remaining-tokens": "5"}) == 2
    assert window_left(used | {"x-ratelimit-reset-tokens": "2h"}) == api_limits.LONGEST_PAUSE
    assert window_left({"x-ratelimit-remaining-requests": "0"}) == 0
    assert window_left({}) == 0


def test_backoff_doubles_is_seeded_and_bounded():
    waits = [backoff(attempt, "seed") for attempt in range(40)]
    assert waits == [backoff(attempt, "seed") for attempt in range(40)]
    assert waits[0] != backoff(0, "another")
    for attempt, wait in enumerate(waits):
        whole = min(api_limits.LONGEST_DELAY, api_limits.FIRST_DELAY * 2 ** attempt)
        assert whole / 2 <= wait <= whole


def test_a_gate_holds_and_lets_go():
    gate, stop = Gate(), threading.Event()
    gate.pause(0.1)
    gate.pause(0)
    start = time.monotonic()
    gate.wait(stop)
    assert time.monotonic() - start >= 0.09
    gate.pause(60)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        gate.wait(stop)


def test_a_request_waits_for_cheaper_ends_before_it_is_refused():
    account, stop = Account((1e6, 1e6), 10), threading.Event()
    account.reserve(8, stop)
    passed = threading.Event()
    waiting = threading.Thread(target=lambda: (account.reserve(5, stop), passed.set()))
    waiting.start()
    assert not passed.wait(0.1)
    account.settle(8, 2, 1, 1)
    assert passed.wait(2)
    waiting.join()
    account.settle(5, 5)
    assert (account.spent, account.read, account.written, account.requests) == (7, 1, 1, 2)
    with pytest.raises(CapReached, match="cost cap 10: 7 spent, the next request may cost 4"):
        account.reserve(4, stop)
    account.reserve(3, stop)
    stop.set()
    with pytest.raises(Stopped):
        account.reserve(1, stop)


def test_without_prices_or_cap_nothing_is_refused():
    stop = threading.Event()
    for account in (Account(None, 0), Account((1, 1), 0)):
        account.reserve(1e9, stop)
    assert Account(None, 5).price(100, 100) == 0


def body(content="hi", **more):
    return json.dumps({"choices": [{"message": {"content": content, **more.pop("message", {})}}], **more}).encode()


def test_replies():
    assert api_wire.reply(body(usage={"prompt_tokens": 3, "completion_tokens": 4})) == api_wire.Reply("hi", 3, 4)
    for usage in (None, 7, {}, {"prompt_tokens": -1, "completion_tokens": "4"}, {"prompt_tokens": True}):
        assert api_wire.reply(body(usage=usage)) == api_wire.Reply("hi", None, None)
    assert api_wire.reply(body(None, message={"refusal": "I cannot judge this."})).text == "I cannot judge this."
    assert api_wire.reply(body(None)).text == ""
    assert api_wire.reply(body("half \ud800 pair")).text == "half ? pair"


@pytest.mark.parametrize("damaged", [
    b"", b" \n", b"{", b"[]", b"null", b"7", b'{"choices": []}', b'{"choices": null}', b'{"choices": [{}]}', b"\xff\xfe{",
    b'{"choices": [{"message": {"content": 7}}]}', b'{"choices": [{"message": {"content": null, "refusal": 3}}]}',
    b'{"choices": {"0": 1}}', b"[" * 100_000,
])
def test_damaged_bodies_are_asked_again(damaged):
    with pytest.raises(api_wire.Fault) as fault:
        api_wire.reply(damaged)
    assert fault.value.again
    assert fault.value.paid


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "refusal", "usage"]), inner), max_leaves=12))
def test_any_json_is_a_reply_or_a_fault(content):
    with contextlib.suppress(api_wire.Fault):
        assert isinstance(api_wire.reply(json.dumps(content).encode()).text, str)


def test_bodies_are_bounded_in_size_and_time():
    with pytest.raises(api_wire.Fault, match="more than 4000000 bytes"):
        api_wire.body((b"x" * 100_000 for _ in range(100)), 5)
    with pytest.raises(api_wire.Fault, match=r"no whole reply in 0\.01 s"):
        api_wire.body((time.sleep(0.005) or b"x" for _ in range(100)), 0.01)
    assert api_wire.body([b"a", b"b"], 5) == b"ab"
