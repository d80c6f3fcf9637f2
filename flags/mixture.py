"""Names of weighted sums of adapters: ``task=0.6,safety=0.4`` on a command line, ``task@0.6_safety@0.4`` as a run."""

from __future__ import annotations

import math

Parts = tuple[tuple[str, float], ...]


def read_mixture(text: str) -> Parts:
    """(run, weight) pairs of ``NAME=WEIGHT,NAME=WEIGHT``; one pair alone shrinks or grows an adapter.

    Raises:
        ValueError: says what is wrong.
    """
    parts = []
    for item in text.split(","):
        name, equals, weight = (word.strip() for word in item.rpartition("="))
        if not equals or not name:
            raise ValueError(f"'{item.strip()}' needs the form NAME=WEIGHT")
        if "@" in name or "/" in name:
            raise ValueError(f"'{name}' is no run's name; give runs below results/outputs")
        parts.append((name, _number(weight)))
    if len({name for name, _ in parts}) < len(parts):
        raise ValueError("the same adapter twice; give it once, with more weight")
    return tuple(parts)


def mixture_run(parts: Parts) -> str:
    """The run's name: NAME@WEIGHT, joined by ``_``."""
    return "_".join(f"{name}@{weight:.10g}" for name, weight in parts)


def mixture_parts(run: str) -> Parts:
    """(run, weight) pairs of such a name; empty for an ordinary run.

    Raises:
        ValueError: it has an @ but not this form.
    """
    if "@" not in run:
        return ()
    name, *rest = run.split("@")
    parts = []
    for i, piece in enumerate(rest):
        # a number holds no underscore, so the first one ends it
        weight, mark, following = piece.partition("_")
        last = i == len(rest) - 1
        if not name or last == bool(mark) or last == bool(following):
            raise ValueError(f"'{run}' is no weighted sum; needed: NAME@WEIGHT_NAME@WEIGHT")
        parts.append((name, _number(weight)))
        name = following
    return tuple(parts)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"weight '{text}' is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"weight {text} must be finite")
    return value
