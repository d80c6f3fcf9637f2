"""Group of flags: the adapters whose weights are sought."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import Flags

#: Methods that seek the weights of trained adapters: by gradient, and without.
FUSED = ("soup", "search")


@dataclass(frozen=True)
class SoupFlags(Flags):
    """Adapters that stay as they are."""

    heading = "Soup and search"
    whose = "belongs to --method soup or search; add one of them or drop it"
    adapters: str | None = flag(None, "soup, search: the adapters whose weights are sought, commas; runs or folders")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.adapters or "").split(",") if name.strip())
