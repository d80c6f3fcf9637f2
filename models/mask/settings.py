"""What a mask is, apart from its logits: written beside them as mask.json and read back. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errors import UserError

SPACES = ("weights", "factors")
RULES = ("single", "task_arithmetic", "ties", "dare", "average")
READOUTS = ("soft", "hard", "expected", "threshold", "top", "average")
#: Factor on the merged task vectors, by rule (spec section 4.3; full models of the paper: 0.04 for task arithmetic).
LAMBDAS = {"task_arithmetic": 0.3, "ties": 0.4, "dare": 0.3}
EXCLUDABLE = ("embeddings", "norms", "head")


@dataclass(frozen=True)
class Rule:
    """How masked task vectors become one: fused = lambda sum_i I_i v_i, with I_i from TIES or DARE, else 1.

    Args:
        name: one of RULES; with one task, task arithmetic, TIES and averaging leave it as it is (coefficient 1).
        density: TIES: share of each task vector that is kept, over the whole model.
        drop: DARE: share of entries that is dropped.
    """

    name: str = "single"
    lambda_: float = 1.0
    density: float = 0.2
    drop: float = 0.2

    @property
    def linear(self) -> bool:
        """Whether the fused vector is linear in the task vectors, so that one sum stands for all of them."""
        return self.name in ("single", "task_arithmetic", "average")


def rule_for(name: str, tasks: int, lambda_: float | None = None, density: float = 0.2, drop: float = 0.2) -> Rule:
    """The rule of a run, its published coefficients filled in; of one task only DARE changes anything."""
    # as published: task arithmetic and TIES leave one task as it is, coefficient 1; DARE drops and multiplies all the same
    if tasks == 1 and name != "dare":
        return Rule()
    if name == "average":
        return Rule(name, 1 / tasks)
    return Rule(name, LAMBDAS[name] if lambda_ is None else lambda_, density, drop)


@dataclass(frozen=True)
class Settings:
    """Everything that the logits' meaning depends on.

    Args:
        space: "weights": masks on theta_i - theta_s (of LoRA tasks: B_i A_i - B_s A_s); "factors": on A_i - A_s, B_i - B_s.
        granularity: what shares a logit; ``rank`` masks the singular components of each LoRA change.
        block: entries per logit of ``block``.
        rescale: what masks are divided by: nothing, their mean over the tensor ("detached": no gradient through it),
            over all tensors, or the mean of sigmoid(s).
        temperature: of the last training step.
        exclude: kinds of tensors whose task vector stays whole.
        seed: of the training's draws.
    """

    space: str = "weights"
    granularity: str = "element"
    block: int = 64
    rescale: str = "tensor"
    rule: Rule = field(default_factory=Rule)
    temperature: float = 0.5
    exclude: tuple[str, ...] = ()
    seed: int = 42

    def to_json(self) -> dict[str, Any]:
        """As mask.json holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Settings:
        """From mask.json; a TypeError or KeyError for anything that ``to_json`` did not write."""
        # JSON knows neither dataclasses nor tuples
        return cls(**{**content, "rule": Rule(**content["rule"]), "exclude": tuple(content["exclude"])})


@dataclass(frozen=True)
class Readout:
    """How logits become a mask: ``kind`` of READOUTS; ``value``: threshold, share of the largest, or number of draws."""

    kind: str = "expected"
    value: float | None = None

    @property
    def required_value(self) -> float:
        """``value``; a ValueError for a kind that has none."""
        if self.value is None:
            raise ValueError(f"{self.kind}: a read-out without a number")
        return self.value

    @property
    def random(self) -> bool:
        """Whether a seed belongs to it."""
        return self.kind in ("soft", "hard", "average")

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}:{self.value:g}"


def parse_readout(text: str, flag: str = "--readout") -> Readout:
    """"hard", "soft", "expected", "threshold[:LOGIT]", "top:SHARE", "average[:DRAWS]".

    Raises:
        UserError: anything else.
    """
    kind, colon, given = text.partition(":")
    allowed = "soft, hard, expected, threshold or threshold:LOGIT, top:SHARE, average or average:DRAWS"
    problem = UserError(f"{flag} {text}: not a read-out; allowed: {allowed}")
    if kind not in READOUTS or (colon and kind in ("soft", "hard", "expected")):
        raise problem
    if not colon:
        if kind == "top":
            raise UserError(f"{flag} top: needs the share to keep, e.g. top:0.5")
        return Readout(kind, {"threshold": 0.0, "average": 16.0}.get(kind))
    try:
        value = float(given)
    except ValueError:
        raise problem from None
    out_of_range = {"top": not 0 < value <= 1, "average": value < 1 or value % 1 != 0}
    if value != value or out_of_range.get(kind):  # NaN is the one number that differs from itself
        raise UserError(f"{flag} {text}: out of range; top takes a share in (0, 1], average a whole number from 1")
    return Readout(kind, value)
