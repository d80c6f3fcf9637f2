"""A weighted sum of adapters as a model, fused when it is loaded: no file is written (arXiv 2501.06208).

    W = W_0 + sum_i w_i B_i A_i = W_0 + [w_1 B_1, w_2 B_2, ..] [A_1; A_2; ..]

The sum is exact (concatenated factors, fp32) and rounded once, to the compute dtype.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from errors import UserError
from flags import FuseAdaptersArgs
from flags.mixture import Parts
from models.adapters.apply import check_fit
from models.adapters.files import Adapter, read_adapter
from models.adapters.fuse import check, common_base, fuse
from models.adapters.methods import ADAPTER_METHODS, Cat
from models.adapters.resident import ResidentBase
from models.base.loading import check_base
from models.run_folders import run_folder


def read_parts(results: Path, parts: Parts) -> list[Adapter]:
    """The adapters of a sum.

    Raises:
        UserError: with the problems of all of them; or they belong to different bases.
    """
    adapters: list[Adapter] = []
    problems: list[str] = []
    # all of them, so that a sum of five with two mistakes takes one try and not three
    for name, _ in parts:
        try:
            adapters.append(read_adapter(run_folder(results, name), name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    common_base(adapters)
    names, weights = ",".join(name for name, _ in parts), ",".join(str(weight) for _, weight in parts)
    check(adapters, FuseAdaptersArgs(adapters=names, weights=weights), ADAPTER_METHODS["cat"])
    return adapters


def load_mix(results: Path, parts: Parts, resident: ResidentBase) -> PreTrainedModel:
    """The base model with the weighted sum in its weights.

    Raises:
        UserError: an adapter is missing, was trained on another base, or holds what a sum of B A cannot.
    """
    adapters = read_parts(results, parts)
    for adapter in adapters:
        check_base(adapter.folder, resident.base)
    check_fit(adapters, resident.shapes())
    fused = fuse(adapters, ADAPTER_METHODS["cat"], Cat(), [weight for _, weight in parts], {}, 0)
    return resident.changed({module: change.pair for module, change in fused.items()})
