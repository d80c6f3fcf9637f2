"""The table of merge methods: name, what it needs, its parameters. Reads no file and loads no torch.

A method is a generator over a tensor's blocks (``models.operators.blocks``): it walks them as often as it needs, then once
more, yielding the fused blocks. A new method is one function of ``models/operators/`` (``dense.py``, ``sparse.py``, ..)
and one row here; parameters, their ranges and their help follow from the row's dataclass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.merging.recipe_values import MethodSpec
from models.operators.declared import Declared
from models.operators.parameters import (
    Breadcrumbs,
    Dare,
    Della,
    DellaTies,
    Interpolation,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    NearSwap,
    NoParameters,
    NuSlerp,
    Passthrough,
    Ram,
    RamPlus,
    Resta,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
)


@dataclass(frozen=True)
class Method(Declared):
    """A row: where its function is, its parameters, how many inputs it takes beside the base, how it walks a tensor.

    Args:
        function: (module below ``models.operators``, name).
        parameters: its dataclass.
        base: whether it works on task vectors, input - base ("yes", "no", or "may": only when given).
        inputs: least and most models beside the base.
        walks: how often it reads its inputs at most.
        source: the paper.
        by_rows: whether a block must hold whole rows (parameters may ask for it: the name of a boolean one).
    """

    function: tuple[str, str]
    parameters: type
    base: str
    inputs: tuple[int, int]
    walks: int
    source: str
    by_rows: bool | str = False
    #: walks more with the parameter ``rescale``
    rescaling: int = 0
    #: walks more with ``scope: model``, before the first tensor
    scoping: int = 0
    #: whether only the inputs of the elected sign count
    elects: bool = False
    #: its parameters that mergekit's method of this name has not, though others of it have: no effect in its recipes
    not_mergekit: frozenset[str] = frozenset()

    def reads(self, parameters: Any) -> int:
        """How often it reads its inputs at most, with these parameters."""
        return (self.walks + (self.rescaling if getattr(parameters, "rescale", False) else 0)
                + (self.scoping if getattr(parameters, "scope", "") == "model" else 0))

    def load(self) -> Callable:
        """The function itself; loads torch."""
        module, name = self.function
        return getattr(importlib.import_module(f"models.operators.{module}"), name)

    def spec(self) -> MethodSpec:
        """What recipes may say about it."""
        fields = self.fields()
        each = frozenset(name for name, item in fields.items() if item.metadata["each"])
        # recipes are read without this table, for they load neither torch nor the operators: they get what they need
        return MethodSpec({name: self.rule(name) for name in fields}, each, min_inputs=self.inputs[0],
                          max_inputs=self.inputs[1], needs_base=self.base == "yes", takes_base=self.base != "no",
                          not_mergekit=self.not_mergekit)

    def rows(self, parameters: Any) -> bool:
        """Whether, with these parameters, a block must hold whole rows."""
        return bool(getattr(parameters, self.by_rows)) if isinstance(self.by_rows, str) else self.by_rows


#: No method has a bound of its own; this one keeps the buffers of a worker, one per input, within reason.
MANY = 64
METHODS: dict[str, Method] = {
    "linear": Method(("dense", "linear"), Linear, "no", (1, MANY), 1, "Wortsman et al. 2022, arXiv 2203.05482"),
    "slerp": Method(("dense", "slerp"), Slerp, "yes", (1, 1), 2, "Shoemake 1985"),
    "karcher": Method(("dense", "karcher"), Karcher, "no", (1, MANY), 2, "Karcher 1977: the n-way SLERP",
                      not_mergekit=frozenset({"weight"})),
    "multislerp": Method(("dense", "multislerp"), MultiSlerp, "may", (1, MANY), 2, "normalised mean on the sphere"),
    "nuslerp": Method(("pairwise", "nuslerp"), NuSlerp, "may", (2, 2), 2, "SLERP of tensors, rows or columns", True),
    "nearswap": Method(("pairwise", "nearswap"), NearSwap, "yes", (1, 1), 1, "alchemonaut 2024, no paper"),
    "arcee_fusion": Method(("pairwise", "arcee_fusion"), NoParameters, "yes", (1, 1), 3, "Arcee AI, no paper", True),
    "ram": Method(("overlap", "ram"), Ram, "yes", (1, MANY), 1, "arXiv 2601.13572"),
    "ramplus_tl": Method(("overlap", "ramplus_tl"), RamPlus, "yes", (1, MANY), 2, "arXiv 2601.13572"),
    "task_arithmetic": Method(("dense", "task_arithmetic"), TaskArithmetic, "yes", (1, MANY), 1, "arXiv 2212.04089"),
    "wise_ft": Method(("dense", "wise_ft"), Interpolation, "yes", (1, 1), 1, "arXiv 2109.01903"),
    "resta": Method(("dense", "resta"), Resta, "yes", (2, 2), 1, "arXiv 2402.11746"),
    "model_stock": Method(("dense", "model_stock"), ModelStock, "yes", (2, MANY), 2, "arXiv 2403.19522", "filter_wise"),
    "passthrough": Method(("dense", "passthrough"), Passthrough, "no", (1, 1), 1, "a copy"),
    "ties": Method(("sparse", "ties"), Ties, "yes", (1, MANY), 3, "arXiv 2306.01708", rescaling=1, scoping=1, elects=True),
    "dare_linear": Method(("sparse", "dare_linear"), Dare, "yes", (1, MANY), 1, "arXiv 2311.03099"),
    "dare_ties": Method(("sparse", "dare_ties"), Dare, "yes", (1, MANY), 1, "arXiv 2311.03099", elects=True),
    "della_linear": Method(("sparse", "della_linear"), Della, "yes", (1, MANY), 1, "arXiv 2406.11617", True),
    "della": Method(("sparse", "della"), DellaTies, "yes", (1, MANY), 1, "arXiv 2406.11617", True, elects=True),
    "breadcrumbs": Method(("sparse", "breadcrumbs"), Breadcrumbs, "yes", (1, MANY), 3, "arXiv 2312.06795", rescaling=1),
    "breadcrumbs_ties": Method(("sparse", "breadcrumbs_ties"), Breadcrumbs, "yes", (1, MANY), 3, "arXiv 2312.06795",
                               rescaling=1, elects=True),
    "sce": Method(("sparse", "sce"), Sce, "yes", (1, MANY), 5, "arXiv 2408.07990", not_mergekit=frozenset({"lambda"})),
}
