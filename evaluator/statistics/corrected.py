"""Rates of a judge with known errors, corrected by its sensitivity and specificity on answers that people labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scipy import stats

from evaluator.statistics.metrics import CONFIDENCE, Difference, Score, wilson

if TYPE_CHECKING:
    from evaluator.statistics.axes import Axis, Measured

#: Labelled answers of each kind below which a judge's errors are not known well enough to divide by.
LEAST_LABELS = 10


@dataclass(frozen=True)
class Errors:
    """A yes/no judge on labelled answers: it found ``hits`` of ``yes`` and let pass ``passes`` of ``no``."""

    hits: int
    yes: int
    passes: int
    no: int

    @classmethod
    def of(cls, said: Sequence[bool], labels: Sequence[bool]) -> Errors:
        """From the judge's verdicts and people's labels of the same answers."""
        pairs = list(zip(said, labels, strict=True))
        return cls(sum(a and b for a, b in pairs), sum(labels), sum(not a and not b for a, b in pairs),
                   len(pairs) - sum(labels))

    def problem(self) -> str:
        """Why no rate can be corrected with these labels; "" when one can."""
        if min(self.yes, self.no) < LEAST_LABELS:
            return (f"{self.yes} answers are labelled 1 and {self.no} are labelled 0; at least {LEAST_LABELS} of each are "
                    "needed to know the judge's errors")
        if self.tells <= 0:
            return (f"the judge finds {self.hits} of {self.yes} and lets pass {self.passes} of {self.no}: on these labels "
                    "it is no better than chance, so its rate says nothing that could be corrected")
        return ""

    @classmethod
    def read(cls, told: Any) -> Errors | None:
        """From what ``as_dict`` gave; None where a part is missing or is none."""
        counts = []
        for part in ("sensitivity", "specificity"):
            share = told.get(part) if isinstance(told, dict) else None
            if not isinstance(share, dict) or not all(isinstance(share.get(key), int | float) for key in ("value", "n")):
                return None
            counts += [round(share["value"] * share["n"]), round(share["n"])]
        return cls(*counts)

    @property
    def tells(self) -> float:
        """Sensitivity + specificity - 1 (Youden's J): what of a true difference the judge's rates show."""
        return self.hits / self.yes + self.passes / self.no - 1

    def as_dict(self) -> dict[str, Any]:
        """Sensitivity and specificity with Wilson intervals, for the scores file."""
        return {name: {"value": k / n, **dict(zip(("low", "high"), wilson(k, n), strict=True)), "n": n}
                for name, k, n in (("sensitivity", self.hits, self.yes), ("specificity", self.passes, self.no)) if n}


def rogan_gladen(rate: Score, errors: Errors, name: str, definition: str) -> Score:
    """(rate + specificity - 1) / (sensitivity + specificity - 1), cut at 0 and 1 (Rogan and Gladen, 1978).

    The interval is Lang and Reiczigel's (2014, section 2.2): it carries the doubt about both errors, so it is wider than the
    rate's own. It takes the labelled answers for others than those of the rate.
    """
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    sensitivity, specificity = errors.hits / errors.yes, errors.passes / errors.no
    value = (rate.value + specificity - 1) / (sensitivity + specificity - 1)
    # two more labels of each kind, one right and one wrong, and Agresti and Coull's four more answers
    m_yes, m_no, n = errors.yes + 2, errors.no + 2, rate.n + z * z
    se, sp = (errors.hits + 1) / m_yes, (errors.passes + 1) / m_no
    q = (rate.n * rate.value + z * z / 2) / n
    middle = (q + sp - 1) / (se + sp - 1)
    from_yes, from_no = se * (1 - se) / m_yes, sp * (1 - sp) / m_no
    shift = 2 * z * z * (middle * from_yes - (1 - middle) * from_no)
    half = z * math.sqrt(q * (1 - q) / n + middle**2 * from_yes + (1 - middle) ** 2 * from_no) / (se + sp - 1)
    low, high = middle + shift - half, middle + shift + half
    # a rate below what false alarms alone would make it says that the judge errs otherwise here than on the labels: what is
    # cut at 0 or 1 is never known better than the rate itself
    low, high = min(low, rate.low) if value > 1 else low, max(high, rate.high) if value < 0 else high
    cut = [min(1.0, max(0.0, x)) for x in (value, low, high)]
    return Score(cut[0], min(cut[0], cut[1]), max(cut[0], cut[2]), rate.n, name, definition, rate.higher_is_better)


def errors_of(item: Measured, axis: Axis) -> Errors | None:
    """The keyword judge's errors by which a report corrects a rate: those of --labels where the rate was corrected by them,
    else those on the labelled answers that are kept with the code. None where they are not known, or allow no correction.

    Args:
        axis: of the rate as it is.
    """
    judges = item.details.get("judges", {})
    by_labels = judges.get("labels", {}).get(axis.score)
    if isinstance(by_labels, dict) and by_labels.get("correction") != "none":
        # labels of the very answers correct each model by itself: no common errors
        told = by_labels if by_labels.get("correction") == "rogan-gladen" else None
    else:
        told = judges.get("own", {}).get("judges", {}).get("keyword", {}).get(axis.set)
    errors = Errors.read(told)
    return errors if errors and not errors.problem() else None


def with_corrected(item: Measured, axes: Sequence[Axis]) -> Measured:
    """The run with the scores of these axes (``axes.CORRECTED``) added; those that --labels made stay."""
    made = {}
    for axis in axes:
        raw, errors = item.scores.get(axis.parts[0].score), errors_of(item, axis.parts[0])
        if axis.score in item.scores or not raw or not errors or any(raw[key] is None for key in ("value", "low", "high")):
            continue
        text = (f"{axis.parts[0].score}, corrected by the keyword judge's sensitivity ({errors.hits} of {errors.yes}) and "
                f"specificity ({errors.passes} of {errors.no}) on labelled answers of the embedded models to such prompts "
                "(Rogan and Gladen, 1978; interval of Lang and Reiczigel, 2014); other models may meet other errors")
        rate = Score(raw["value"], raw["low"], raw["high"], raw["n"], axis.score, text, axis.higher)
        made[axis.score] = rogan_gladen(rate, errors, axis.score, text).as_dict()
    # as the rate that it is made from: same answers, same rules
    origin = {name: item.origin.get(axis.parts[0].score, {}) for axis in axes if (name := axis.score) in made}
    return replace(item, scores=item.scores | made, origin=item.origin | origin) if made else item


def corrected_difference(raw: Difference, errors: Errors) -> Difference:
    """The difference of two rates of one judge, divided by what it tells apart; p stays, for 0 stays 0.

    Its half widths are the root of the sum of squares of the raw difference's, divided alike, and of what the doubt about
    both errors makes of the difference (delta method, two labels more of each kind, as in ``rogan_gladen``).
    """
    m_yes, m_no = errors.yes + 2, errors.no + 2
    se, sp = (errors.hits + 1) / m_yes, (errors.passes + 1) / m_no
    doubt = math.sqrt(se * (1 - se) / m_yes + sp * (1 - sp) / m_no) * float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    value = raw.value / errors.tells
    low, high = (math.hypot((end - raw.value) / errors.tells, value * doubt / errors.tells) for end in (raw.low, raw.high))
    return Difference(*(min(1.0, max(-1.0, x)) for x in (value, value - low, value + high)), raw.p, raw.n)
