"""The answer of every command to --plan."""

from __future__ import annotations

from collections.abc import Callable

from config import Parsed


def planned(parsed: Parsed, say: Callable[[str], None]) -> bool:
    """Whether --plan was asked for; its lines are then said.

    Raises:
        UserError: as ``told``.
    """
    if not parsed.plan:
        return False
    # a run has no plan to reckon
    from models.footprint.command import told

    for line in told(parsed):
        say(line)
    return True
