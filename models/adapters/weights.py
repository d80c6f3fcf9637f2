"""Weights of adapters that depend on the adapters: equal norms before the given weights apply.

The fusion weight lambda only means something relative to ||Delta_s|| / ||Delta_t||: a safety adapter that was trained longer
acts harder at the same lambda (arXiv 2501.06208 leaves the norms free). Matched, adapter i acts with w_i ||Delta_1||.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from errors import UserError
from models.adapters.files import Adapter
from models.operators.low_rank import pair_squared_norm


def matched(adapters: Sequence[Adapter], scope: str) -> tuple[list[Adapter], dict[str, list[float]]]:
    """The adapters with every change rescaled to the first adapter's Frobenius norm.

    Args:
        scope: model: one factor per adapter; module: one per module, for the modules that both train.

    Returns:
        the adapters, and the factors that were applied, by adapter.

    Raises:
        UserError: an adapter that must be rescaled is zero.
    """
    # squared, for those of the modules add up to the whole change's
    first = _squared_norms(adapters[0])
    rescaled, factors = [adapters[0]], {}
    for adapter in adapters[1:]:
        mine = _squared_norms(adapter)
        shared = [module for module in mine if module in first]
        if not sum(mine.values()) or not shared:
            raise UserError(f"--match_norms {scope}: adapter '{adapter.name}' "
                            + ("changes nothing" if shared else f"shares no module with '{adapters[0].name}'")
                            + ", so it has no norm to match; leave the flag out")
        if scope == "model":
            ratio = (sum(first.values()) / sum(mine.values())) ** 0.5
            ratios = dict.fromkeys(mine, ratio)
        else:
            ratios = {module: (first[module] / size) ** 0.5 if module in first and size else 1.0
                      for module, size in mine.items()}
        factors[adapter.name] = [ratios[module] for module in shared]
        # the scale goes with B: who needs the raw factors (--compat peft) divides it out again
        rescaled.append(replace(adapter, modules={m: (a, b * ratios[m]) for m, (a, b) in adapter.modules.items()},
                                scales={m: scale * ratios[m] for m, scale in adapter.scales.items()}))
    return rescaled, factors


def _squared_norms(adapter: Adapter) -> dict[str, float]:
    return {module: pair_squared_norm(pair) for module, pair in adapter.modules.items()}


def norm(adapter: Adapter) -> float:
    """Frobenius norm of the whole change."""
    return sum(_squared_norms(adapter).values()) ** 0.5
