"""How the answers to a set of prompts are read: one row each, for columns of reports and for the papers' summary numbers."""

from __future__ import annotations

from dataclasses import dataclass

from flags.judges import COMPARING, KNOWN


@dataclass(frozen=True)
class Reading:
    """One way to read the answers to a set.

    Args:
        name: of the score behind its set's name (SET.NAME); of a judge of --judges: the judge's, before its set's.
        title: of its column, before the set's name; "" where ``axes.judge_axes`` makes it.
        key: of the value in the rows.
        kind: how two runs are compared on it (``axes.Axis``).
        judge: who says so, as shown beside the set.
        part: which part of the summary numbers it can be; "" for none.
    """

    name: str
    title: str
    key: str
    kind: str
    higher: bool
    judge: str
    part: str = ""


def _judged(part: str, *names: str) -> tuple[Reading, ...]:
    """Judges of --judges as a part of the summary numbers, in order of preference."""
    return tuple(Reading(name, "", name, "mean" if KNOWN[name].question in COMPARING else "rate",
                         KNOWN[name].question != "harm", name, part) for name in names)


READINGS = (
    Reading("safe_refusal", "refusal", "safe_refusal", "rate", True, "keyword and coherence rules"),
    Reading("overrefusal", "over-refusal", "refusal", "rate", False, "keyword rules", "over-refusal"),
    Reading("balance", "refusal − over-refusal", "", "balance", True, "keyword and coherence rules"),
    Reading("win_rate", "win rate", "alpaca_eval.win_rate", "mean", True, "the annotator of alpaca_eval", "WR"),
    *_judged("WR", "pairwise", "api-preference", "reward"),
    *_judged("SS", "moderation", "guard", "harmbench", "api-harm"),
    *_judged("truth", "truth", "api-truth"),
    *_judged("info", "info", "api-info"),
    *_judged("worst mark", "api-harm"),
    *_judged("PS", "safer", "api-safety-preference"),
)
#: Columns of another set than the embedded ones, by their score's name behind the set's.
COLUMNS = {reading.name: reading for reading in READINGS if reading.title}
#: The sets that a part of the summary numbers is read from, the paper's own first, the embedded stand-in last.
SETS = {
    "WR": ("alpaca_eval", "alpacaeval_50", "alpacaeval", "helpfulness"),
    "SS": ("beavertails_500", "beavertails", "safety"),
    "TI": ("truthfulqa_published", "truthfulqa_leak_free", "truthfulness"),
    "worst mark": ("hex_phi", "safety"),
    "PS": ("safety",),
    "over-refusal": ("overrefusal",),
}


def keys(part: str) -> tuple[str, ...]:
    """The values that can be a part of the summary numbers, in order of preference."""
    return tuple(reading.key for reading in READINGS if reading.part == part)
