"""A headless Chromium driven over the DevTools protocol: what a page said, asked for and looks like."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp
import pytest

#: No window, no sandbox (CI is root), nothing that asks a server by itself.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")


def chromium() -> str:
    """The browser's path; without one the test is skipped, in CI it fails."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        why = "needs Chromium: apt-get install -y chromium (Debian), or the like"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


class Browser:
    """One page of a browser of its own, with an empty profile; every call waits for its reply.

    Attributes:
        events: what the page reported so far, oldest first: {"method", "params"}.
    """

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp()
        self.process = subprocess.Popen([chromium(), *FLAGS, f"--user-data-dir={self.profile}", "--remote-debugging-port=0",
                                         "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        start_new_session=True)
        self.loop, self.events, self.calls = asyncio.new_event_loop(), [], 0
        self.loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # a page that nobody looks at has no focus to give
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    async def _connect(self) -> None:
        port, end = Path(self.profile, "DevToolsActivePort"), time.monotonic() + 120
        while not (port.is_file() and port.read_text().count("\n")):
            assert time.monotonic() < end, "Chromium did not start"
            await asyncio.sleep(0.1)
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as reply:
            pages = [target for target in await reply.json() if target["type"] == "page"]
        self.socket = await self.session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **params):
        """The reply of a DevTools method."""
        return self.loop.run_until_complete(self._call(method, params))

    async def _call(self, method, params):
        self.calls += 1
        wanted = self.calls
        await self.socket.send_json({"id": wanted, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=120)
            if message.get("id") == wanted:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.call("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 120
        while self.run("location.href + document.readyState") != path.as_uri() + "complete":
            assert time.monotonic() < end, "the page did not load"
            time.sleep(0.1)

    def run(self, script: str):
        """The value of an expression in the page."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def complaints(self) -> list:
        """Errors and warnings of the console, exceptions, refusals by the page's policy, and dialogs."""
        named = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [event for event in self.events if event["method"] in named]

    def requests(self) -> list[str]:
        """What was asked for, the file itself included."""
        return [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End the browser and everything that it started."""
        self.loop.run_until_complete(self.socket.close())
        self.loop.run_until_complete(self.session.close())
        self.loop.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)
