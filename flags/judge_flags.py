"""Flags of judges behind an OpenAI-compatible endpoint, and what can be wrong with them. The standard library only."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from config import flag
from flags.base import ResultsFlags, SeedFlags

OPENAI = "https://api.openai.com/v1"
#: Upper case only: a key given here by mistake is recognised, refused and not repeated.
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_MOST_AT_ONCE = 256


@dataclass(frozen=True)
class ApiFlags(SeedFlags, ResultsFlags):
    """Where API judges ask, how hard they try, and what they may cost."""

    heading, general = "API judges", False
    judge_model: str = flag("", "model that api-* judges ask, as the endpoint calls it; with its date where it has one")
    judge_base_url: str = flag(OPENAI, "OpenAI-compatible endpoint of api-* judges, up to /v1")
    judge_key_variable: str = flag("OPENAI_API_KEY", "environment variable that holds the endpoint's key, e.g. MY_KEY")
    judge_concurrency: int = flag(8, "requests to the endpoint at once", low=1)
    judge_retries: int = flag(6, "further tries after a rate limit, a fault or a damaged reply", low=0)
    judge_timeout: float = flag(120.0, "seconds to wait for one reply", low=0.01)
    judge_max_tokens: int = flag(512, "longest reply of an API judge in tokens", low=1)
    judge_prices: str = flag("", "price of a million tokens, IN,OUT, e.g. 2.5,10; empty: costs are not counted")
    max_cost: float = flag(0.0, "ask no more rather than spend more than this, in the money of --judge_prices; of this "
                                "process alone: two at once may spend it twice; 0: no cap", low=0)

    @property
    def prices(self) -> tuple[float, float] | None:
        """Price of a million tokens (read, written); None when --judge_prices is empty or no such pair."""
        try:
            read, written = (float(part) for part in self.judge_prices.split(","))
        except ValueError:
            return None
        return (read, written) if min(read, written) >= 0 and math.isfinite(read + written) else None

    @property
    def judge_is_local(self) -> bool:
        """Whether the endpoint is on this machine: no key is needed then."""
        return is_loopback(self.judge_base_url)

    def api_problems(self, judges: Iterable[str]) -> list[str]:
        """What stops the api-* ones of these judges from asking; nothing is looked up. No message repeats a secret."""
        named = [name for name in judges if name.startswith("api-")]
        return [*self.endpoint_problems(named[0]), *self._price_problems()] if named else []

    def endpoint_problems(self, asker: str, *, model: bool = True) -> list[str]:
        """The part about model, address and key; ``asker`` is the judge or command that the messages name."""
        found = []
        if model and not self.judge_model:
            found.append(f"--judge_model: {asker} needs the name of a model at {OPENAI if self._plain else 'the endpoint'}")
        if not self._plain:
            found.append("--judge_base_url: needs http(s)://HOST[:PORT][/PATH] without a user, a password or a query; "
                         "the key comes from the environment only")
        if not _VARIABLE.fullmatch(self.judge_key_variable):
            found.append("--judge_key_variable: needs the NAME of an environment variable (A-Z, 0-9, _), never the key")
        else:
            key = os.environ.get(self.judge_key_variable, "").strip()
            if self._plain and not self.judge_is_local and not key:
                found.append(f"{self.judge_key_variable}: {asker} asks {self.judge_base_url} and needs its key in this "
                             "environment variable; export it, or name another with --judge_key_variable")
            if not (key.isascii() and key.isprintable()):
                found.append(f"{self.judge_key_variable}: holds characters that no key has (not printable ASCII)")
        if self.judge_concurrency > _MOST_AT_ONCE:
            found.append(f"--judge_concurrency {self.judge_concurrency}: at most {_MOST_AT_ONCE}")
        return found

    @property
    def _plain(self) -> bool:
        try:
            parts = urlsplit(self.judge_base_url)
            port_is_fine = parts.port is None or parts.port > 0
        except ValueError:
            return False
        return (parts.scheme in ("http", "https") and bool(parts.hostname) and port_is_fine
                and not (parts.username or parts.password or parts.query or parts.fragment))

    def _price_problems(self) -> list[str]:
        found = []
        if self.judge_prices and self.prices is None:
            found.append(f"--judge_prices {self.judge_prices}: needs two prices of a million tokens, IN,OUT, e.g. 2.5,10")
        if self.max_cost and not self.judge_prices:
            found.append(f"--max_cost {self.max_cost:g}: needs --judge_prices IN,OUT to count with")
        return found


def is_loopback(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
