"""The table of ways to realign: what becomes of the task vectors before they are merged, and of the result after.

    theta = theta_aligned + finish(rule([edit(theta_i - theta_aligned) ..]))

Reads no file and loads no torch. A new method is one function or two in ``formulas.py`` and one row here; parameters, their
ranges and their help follow from the row's dataclass (``declared.number``).

Users name shares as the papers do, ``drop`` (p) and ``kept``; the operators know the share kept alone, so each such class
says its ``density``, and nothing else converts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.operators.declared import Declared, assignments, number, scalar
from models.operators.parameters import SCOPES, NoParameters


@dataclass(frozen=True)
class Readout:
    """Of a trained mask: see ``models.mask.export``."""


@dataclass(frozen=True)
class RandomMask:
    kept: float = number(0.5, "share of the entries that is kept", 1e-6, 1)
    soft: bool = number(False, "a soft draw (binary Concrete) of constant logits instead of zeros and ones")
    temperature: float = number(0.5, "of a soft draw", 1e-3)
    rescale: bool = number(True, "divide by the mask's mean, tensor by tensor, as SOMF does")

    @property
    def density(self) -> float:
        return self.kept


@dataclass(frozen=True)
class Magnitude:
    kept: float = number(0.5, "share of the entries that is kept: the largest", 1e-6, 1)
    scope: str = number("model", "where the largest are sought: tensor or model", choices=SCOPES)
    rescale: bool = number(False, "divide by the kept share, tensor by tensor")

    @property
    def density(self) -> float:
        return self.kept


@dataclass(frozen=True)
class WiseFt:
    alpha: float = number(None, "0: the aligned model, 1: the tuned one", 0, 1)


class _Drops:
    """Parameters with the paper's p as ``drop``."""

    drop: float

    @property
    def density(self) -> float:
        """The share that is kept."""
        return 1 - self.drop


@dataclass(frozen=True)
class Dare(_Drops):
    drop: float = number(0.3, "share of the entries that is dropped; the others grow by 1 / (1 - drop)", 0, 0.999999)


@dataclass(frozen=True)
class Resta(_Drops):
    gamma: float = number(0.5, "factor on the safety vector, aligned - unaligned")
    drop: float = number(0.0, "DARE on the task vectors first (RESTA_d)", 0, 0.999999)


@dataclass(frozen=True)
class SafeLora:
    tau: float = number(0.5, "project where the cosine of the change and its projection is below", -1, 1)
    exact: bool = number(False, "an orthogonal projection instead of the paper's V V^T / ||V||, which also shrinks")


@dataclass(frozen=True)
class SafeMerge:
    tau: float = number(0.5, "merge where the cosine of the change and its projection is below", -1, 1)
    alpha: float = number(0.5, "share of the task's change in a merged layer; the rest is the safety-tuned model's", 0, 1)


@dataclass(frozen=True)
class Single:
    pass


@dataclass(frozen=True)
class TaskArithmetic:
    lambda_: float = number(0.3, "factor on the sum (published: 0.3 for LoRA, 0.04 for full models)")


@dataclass(frozen=True)
class Ties:
    density: float = number(0.2, "share of a task vector that is kept", 1e-6, 1)
    lambda_: float = number(0.4, "factor on the disjoint sum")
    scope: str = number("model", "where the largest are sought: tensor or model", choices=SCOPES)


@dataclass(frozen=True)
class DareSum(_Drops):
    drop: float = number(0.2, "share of the entries that is dropped; the others grow by 1 / (1 - drop)", 0, 0.999999)
    lambda_: float = number(0.3, "factor on the sum")


@dataclass(frozen=True)
class Row(Declared):
    """A method or a rule.

    Args:
        parameters: its dataclass.
        source: the paper.
        edit: function ``(weight, parameters) -> task vectors``; empty: as they are.
        finish: function ``(fused, weight, parameters) -> fused``; empty: as it is. Of a rule: ``(task vectors, weight,
            parameters) -> fused``.
        needs: what it reads beside the aligned model and the tasks: "unaligned", "safe" or "mask".
        low_rank: whether the result of LoRA changes is again of low rank: an adapter holds it without loss.
        largest: whether it keeps the largest entries, a share ``density`` of them.
    """

    parameters: type
    source: str
    edit: str = ""
    finish: str = ""
    needs: tuple[str, ...] = ()
    low_rank: bool = True
    largest: bool = False

    def load(self, stage: str) -> Callable | None:
        """The function of a stage ("edit" or "finish"), None where there is none; loads torch."""
        name = getattr(self, stage)
        return getattr(importlib.import_module("models.realign.formulas"), name) if name else None

    def configured(self, text: str, flag: str, problems: list[str]) -> Any:
        """The parameters from "name=value; name=value"; None where that is not possible.

        Args:
            problems: gets a sentence for every name that is unknown, missing or has no fitting value.
        """
        values: dict[str, Any] = {}
        fields = self.fields()
        for written, name, given in assignments(text):
            if name not in fields:
                allowed = ", ".join(fields) or "none"
                problems.append(f"{flag} {written}: not a parameter here; allowed: {allowed} (name=value)")
                continue
            try:
                values[name] = self.checked(name, scalar(given))
            except ValueError as error:
                problems.append(f"{flag} {written}: {error}")
        missing = self.missing(values)
        named = {name for _, name, _ in assignments(text)}  # what is wrong with their values is said
        problems += [f"{flag}: needs {name}, e.g. \"{name}=0.5\": {fields[name].metadata['help']}" for name in missing
                     if name not in named]
        return None if missing else self.parameters(**{fields[name].name: value for name, value in values.items()})


METHODS: dict[str, Row] = {
    "merge": Row(NoParameters, "the task vectors as they are"),
    # no function: the mask's own code applies it (models/realign/masks.py)
    "mask": Row(Readout, "SOMF, arXiv 2405.09055", needs=("mask",), low_rank=False),
    "random_mask": Row(RandomMask, "control", edit="random_mask", low_rank=False),
    "magnitude": Row(Magnitude, "control", edit="magnitude", low_rank=False, largest=True),
    "wise_ft": Row(WiseFt, "Wortsman et al. 2022, arXiv 2109.01903", finish="shrink"),
    "dare": Row(Dare, "Yu et al. 2024, arXiv 2311.03099", edit="dare", low_rank=False),
    # low rank unless drop is given, which realign.rank_of looks at
    "resta": Row(Resta, "Bhardwaj et al. 2024, arXiv 2402.11746", edit="dare", finish="add_safety", needs=("unaligned",)),
    "safe_lora": Row(SafeLora, "Hsu et al. 2024, arXiv 2405.16833", finish="project", needs=("unaligned",)),
    "safe_merge": Row(SafeMerge, "Djuhera et al. 2025, arXiv 2503.17239", finish="merge_unsafe",
                      needs=("unaligned", "safe")),
}

#: How several task vectors become one; the defaults are SOMF's (spec section 4.3).
RULES: dict[str, Row] = {
    "": Row(Single, "one task: its vector with coefficient 1", finish="single"),
    "task_arithmetic": Row(TaskArithmetic, "arXiv 2212.04089", finish="add_up"),
    "ties": Row(Ties, "arXiv 2306.01708", finish="ties", low_rank=False, largest=True),
    "dare": Row(DareSum, "arXiv 2311.03099", finish="drop_and_add", low_rank=False),
    "average": Row(NoParameters, "the mean of the task vectors", finish="average"),
}


def parameter_help() -> str:
    """Every method and rule with its parameters, for a person."""
    lines = []
    for title, table in (("--method", METHODS), ("--rule", RULES)):
        for name, row in table.items():
            needs = f"; needs {', '.join('--' + n for n in row.needs)}" if row.needs else ""
            lines.append(f"{title} {name or '(empty)'}: {row.source}{needs}")
            lines += [f"    {key}: {item.metadata['help']} ("
                      + ("must be given" if item.default is None else f"default {item.default}") + ")"
                      for key, item in row.fields().items()]
    return "\n".join(lines)
