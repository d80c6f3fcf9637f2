"""Rank intervals: what all pairs of rows say about a row's place."""

from __future__ import annotations

import pytest
from reported import hits, put

from evaluator.reporting.findings import Line
from evaluator.reporting.ranks import rank_intervals
from evaluator.statistics.axes import AXES
from evaluator.statistics.comparison import measured
from evaluator.statistics.metrics import holm, mcnemar

REFUSAL, OVER = AXES[:2]


def ranks(tmp_path, shares, axis=REFUSAL):
    lines = []
    for run, share in shares.items():
        put(tmp_path, run, refusal=hits(0.5) if axis is OVER or share is None else hits(share),
            over=hits(share) if axis is OVER else None, mc2=None)
        lines.append(Line(run, run, (measured(tmp_path, run),)))
    return rank_intervals(lines, axis)


def test_rows_that_cannot_be_told_apart_share_their_places(tmp_path):
    assert ranks(tmp_path, {"a": 0.1, "b": 0.9, "c": 0.88, "d": 0.5}) == [(4, 4), (1, 2), (1, 2), (3, 3)]


def test_fewer_is_better_where_the_axis_says_so(tmp_path):
    assert ranks(tmp_path, {"a": 0.1, "b": 0.9, "c": 0.12}, OVER) == [(1, 2), (3, 3), (1, 2)]


def test_the_pairs_are_corrected_together(tmp_path):
    """Seven discordant prompts: p is 0.016, enough for one pair and not for ten."""
    p = mcnemar(hits(0.57), hits(0.5)).p
    assert p == pytest.approx(2 / 2**7)
    assert holm([p] * 3 + [1.0] * 3)[0] > 0.05
    assert ranks(tmp_path / "two", {"a": 0.5, "b": 0.57}) == [(2, 2), (1, 1)]
    assert ranks(tmp_path / "four", {"a": 0.5, "b": 0.57, "c": 0.5, "d": 0.5}) == [(1, 4)] * 4


def test_a_row_without_the_score_has_no_place(tmp_path):
    put(tmp_path, "a", refusal=hits(0.9))
    put(tmp_path, "b", mc2=[0.1, 0.2])
    lines = [Line(run, run, (measured(tmp_path, run),)) for run in ("a", "b")]
    assert rank_intervals(lines, REFUSAL) == [(1, 1), None]
