"""A chat-completions endpoint on loopback whose faults are scripted: what a judge's client must survive."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FaultServer:
    """Requests are told apart by the first key of ``script`` that their last message but re-asks holds.

    Args:
        answer: the text of a good reply to a list of messages.
        script: word -> what its requests meet, one after the other; the last one stays. Others meet "ok".
        seen: (word, what it met, key) of every request, in order.
        paid: how often each conversation got a whole reply.
    """

    answer: Callable[[list[dict[str, str]]], str]
    script: dict[str, list[str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = (100, 20)
    slow: float = 1.0
    refused_fields: tuple[str, ...] = ()
    finish: str = "stop"
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    paid: Counter[str] = field(default_factory=Counter)
    bodies: list[dict] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, body: dict, key: str) -> str:
        """Take the next entry of the script for this request."""
        text = body["messages"][0]["content"]
        with self.lock:
            word = next((word for word in self.script if word in text), "")
            plan = self.script.get(word, ["ok"])
            what = plan.pop(0) if len(plan) > 1 else plan[0]
            self.seen.append((word, what, key))
            self.bodies.append(body)
        return what

    def tries(self, word: str) -> int:
        return sum(entry[0] == word for entry in self.seen)


@contextmanager
def serving(server: FaultServer):
    """Run the server on a free loopback port."""
    class Handler(_Handler):
        owner = server

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        with self.owner.lock:
            self.owner.at_once += 1
            self.owner.most_at_once = max(self.owner.most_at_once, self.owner.at_once)
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _done(self) -> None:
        """Before the answer leaves: its reader may ask again at once."""
        with self.owner.lock:
            self.owner.at_once -= 1

    def _answer(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            # its sender was killed
            self._done()
            self.close_connection = True
            return None
        body = json.loads(data)
        key = self.headers.get("Authorization", "")
        refused = next((name for name in self.owner.refused_fields if name in body), None)
        if refused:
            error = {"message": f"Unsupported parameter: '{refused}' is not supported", "param": refused}
            return self._send(400, json.dumps({"error": error}).encode())
        what, owner = self.owner.meet(body, key), self.owner
        good = json.dumps({
            "id": "x", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": owner.finish,
                         "message": {"role": "assistant", "content": owner.answer(body["messages"])}}],
            **({"usage": {"prompt_tokens": owner.usage[0], "completion_tokens": owner.usage[1],
                          "total_tokens": sum(owner.usage)}} if owner.usage else {}),
        }).encode()
        if what == "slow":
            time.sleep(owner.slow)
        elif what == "drip":
            return self._drip(good)
        elif what == "cut":
            return self._send(200, good[: len(good) // 2], length=len(good))
        elif what in ("empty", "malformed", "wrong"):
            return self._send(200, {"empty": b"", "malformed": good[:-9], "wrong": b'{"choices": [{"message": 7}]}'}[what])
        elif what == "echo":
            return self._send(400, json.dumps({"error": {"message": f"bad key {key}"}}).encode())
        elif what != "ok":
            status, _, wait = what.partition(" ")
            return self._send(int(status), b'{"error": {"message": "scripted", "code": null}}',
                              {"Retry-After": wait} if wait else {})
        with owner.lock:
            owner.paid[json.dumps(body["messages"])] += 1
        return self._send(200, good, owner.headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self._done()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = length is not None

    def _drip(self, data: bytes) -> None:
        """One byte at a time, each in time, the whole never."""
        self._done()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass
