"""Group of flags: learning from preference pairs."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import Flags


@dataclass(frozen=True)
class DpoFlags(Flags):
    """Direct preference optimisation, of an adapter or of a mask."""

    heading = "DPO"
    beta: float = flag(0.1, "DPO beta", low=0)
