"""The table of ways to fuse adapters: name, function, parameters. Reads no file and loads no torch.

A method is a pure function ``(changes, weights, parameters, draw) -> fused``. On "tasks" these are the changes of one
module as equal matrices in one space (``core_space.project``) and it returns one such matrix; on "pairs" they are factors
(A (r, in), B (out, r), scale applied) and it returns factors. ``draw(i, shape)`` gives uniform numbers that depend on seed,
adapter, module and place alone. A new method is one function and one row; which flags it takes follows from its dataclass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.operators.declared import Declared


@dataclass(frozen=True)
class Cat:
    pass


@dataclass(frozen=True)
class RankOrEnergy:
    """Where the fused change is cut: at a ``rank`` (None: not at all) or at an ``energy``, a share of the squared norm."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sparse(RankOrEnergy):
    density: float
    space: str = "core"


@dataclass(frozen=True, kw_only=True)
class Knots(RankOrEnergy):
    density: float


@dataclass(frozen=True)
class Tsv(RankOrEnergy):
    """``density``: share of each task's directions that is kept, None: 1 / number of tasks."""

    density: float | None = None


@dataclass(frozen=True)
class Rank:
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class PeftDensity:
    density: float


@dataclass(frozen=True, kw_only=True)
class PeftTies(PeftDensity):
    majority_sign_method: str = "total"


@dataclass(frozen=True, kw_only=True)
class PeftDense(PeftDensity):
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class PeftDenseTies(PeftDense):
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class AdapterMethod(Declared):
    """A row.

    Args:
        function: (module below ``models.adapters``, name).
        parameters: its dataclass; a field without a default must be given.
        on: "tasks" or "pairs", see above; "factors": pairs without their scale, which is in the weights instead.
        source: the paper.
        space: for "tasks", where its parameters do not say.
        largest: whether the rank is the largest of the inputs' when none is given, not their sum.
    """

    function: tuple[str, str]
    parameters: type
    on: str
    source: str
    space: str = "core"
    largest: bool = False

    def load(self) -> Callable:
        """The function itself; loads torch."""
        module, name = self.function
        return getattr(importlib.import_module(f"models.adapters.{module}"), name)

    def configured(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Any:
        """The parameters, from flags that were given (None: not given).

        Args:
            problems: gets a sentence for every flag that this method does not take, or needs and has not.
        """
        fields = self.fields()
        there = {flag: value for flag, value in given.items() if value is not None}
        problems += [f"--{flag} {there[flag]}: {name} takes none; drop it" for flag in there if flag not in fields]
        missing = self.missing(there)
        problems += [f"--{flag}: {name} needs one, e.g. --{flag} 0.5" for flag in missing]
        # types and ranges are the flags' own (flags/fuse.py): only presence is left to judge
        return None if missing else self.parameters(**{flag: there[flag] for flag in fields if flag in there})


def _tasks(name: str, parameters: type, source: str, **more: Any) -> AdapterMethod:
    return AdapterMethod(("merges", name), parameters, "tasks", source, **more)


def _peft(name: str, parameters: type, on: str = "factors") -> AdapterMethod:
    return AdapterMethod(("peft_types", name), parameters, on, "PEFT 0.21, add_weighted_adapter")


ADAPTER_METHODS: dict[str, AdapterMethod] = {
    "cat": AdapterMethod(("merges", "concatenate"), Cat, "pairs", "arXiv 2501.06208"),
    "svd": _tasks("weighted", RankOrEnergy, "QR, then SVD of the core: Core Space, arXiv 2509.17786"),
    # the same sum as svd, cut to the rank that an adapter had: what PEFT's linear is often taken for
    "linear": _tasks("weighted", RankOrEnergy, "task arithmetic on B A, arXiv 2212.04089", largest=True),
    "ties": _tasks("ties", Sparse, "arXiv 2306.01708"),
    "dare_linear": _tasks("dare_linear", Sparse, "arXiv 2311.03099"),
    "dare_ties": _tasks("dare_ties", Sparse, "arXiv 2311.03099"),
    "magnitude_prune": _tasks("magnitude_prune", Sparse, "TIES without the election"),
    # KnOTS is TIES in other axes, hence no function of its own
    "knots": _tasks("ties", Knots, "KnOTS-TIES, arXiv 2410.19735", space="left"),
    "tsv": _tasks("tsv", Tsv, "TSV-M, arXiv 2412.00081"),
    "isotropic": _tasks("isotropic", Rank, "Iso-C, arXiv 2502.04959"),
    "lego": AdapterMethod(("merges", "lego"), Rank, "pairs", "LoRA-LEGO, arXiv 2409.16167", largest=True),
    "random": AdapterMethod(("merges", "random_directions"), Rank, "pairs", "control, arXiv 2602.12323",
                            largest=True),
}

#: --compat peft. The first seven are functions of the factors; ``*_svd`` (flags: the name and --space dense) of dense B A.
PEFT_METHODS: dict[str, AdapterMethod] = {
    "cat": _peft("concatenate", Cat),
    "svd": _peft("svd", Rank),
    "linear": _peft("linear", Cat),
    "ties": _peft("ties", PeftTies),
    "dare_linear": _peft("dare_linear", PeftDensity),
    "dare_ties": _peft("dare_ties", PeftTies),
    "magnitude_prune": _peft("magnitude_prune", PeftDensity),
    "ties_svd": _peft("ties_svd", PeftDenseTies, "pairs"),
    "dare_linear_svd": _peft("dare_linear_svd", PeftDense, "pairs"),
    "dare_ties_svd": _peft("dare_ties_svd", PeftDenseTies, "pairs"),
    "magnitude_prune_svd": _peft("magnitude_prune_svd", PeftDense, "pairs"),
}
#: Those that add factors up, entry by entry, and so need equal ranks.
PEFT_EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
