"""docs/evaluation.md and the pages beside it explain every score, judge and attack; nothing was left to fill in."""

from __future__ import annotations

import re

import config
import flags
from data.sets import protocols
from evaluator import evaluate_safety
from evaluator.agreement import JUDGES
from flags.judges import KNOWN

DOCS = config.ROOT / "docs"
PAGE = (DOCS / "evaluation.md").read_text(encoding="utf-8")
#: The page, and those that its parts about using and looking up lie in.
TEXT = PAGE + "".join((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in (
    "howto/compare-models", "howto/own-judge", "reference/scores", "reference/judges", "reference/protocols"))


def test_the_table_of_protocols_is_the_codes():
    assert protocols.markdown() in TEXT


def test_every_attack_judge_and_score_is_explained():
    for name in flags.base.ATTACKS[1:]:
        assert f"| `{name}` |" in TEXT
    for judge in JUDGES:
        assert f"| {judge} |" in TEXT
    for judge in KNOWN.keys() - JUDGES:
        assert f"`{judge}`" in TEXT or f"`{judge}=MODEL`" in TEXT
    for name in ("REFUSAL", "SAFE", "ASR", "HARM", "INCOHERENT", "OVER", "BALANCE", "BENIGN", "HHH"):
        assert hasattr(evaluate_safety, name)
    for score in ("refusal", "safe_refusal", "published_asr", "harm_rate", "incoherent", "overrefusal", "balance",
                  "harm_false_alarms", "hhh_harmless", "refusal_auc", "refusal_at_10", "pairs_ranked"):
        assert f"| `{score}` |" in TEXT


def test_nothing_was_left_to_fill_in():
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX|[A-Z]+_[A-Z]+)\b", PAGE)


def test_quotes_are_short():
    assert all(len(quote) < 160 for quote in re.findall(r'"([^"|`]*)"', PAGE.split("## Where they fail")[1].split("##")[0]))
