"""Refusal by likelihood in reports: paired by prompt, seeds crossed with prompts, empty where nothing compares."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics import discrimination
from evaluator.statistics.axes import DISCRIMINATION, Measured, refusal_axes
from evaluator.statistics.comparison import cell, difference, over_seeds


def run(harmful, harmless, *, openers="o", prefix="", half=None, threshold=True):
    """A run as ``measured`` reads it: (prompts,) scores of each set, every second prompt in the test half."""
    sets = {"harmful": harmful, "plain": harmless[: len(harmless) // 2], "edgy": harmless[len(harmless) // 2 :]}
    rows = {(f"{prefix}refusal_{name}", str(i)): {"score": float(x), "test_half": i % 2 if half is None else half}
            for name, found in sets.items() for i, x in enumerate(found)}
    scores = {f"{prefix}refusal_auc": discrimination.auc(harmful, harmless, "a", "").as_dict(),
              f"{prefix}refusal_auc_plain": discrimination.auc(harmful, sets["plain"], "a", "").as_dict()}
    kept, test = ([x for name in part for i, x in enumerate(sets[name]) if i % 2 == side]
                  for part, side in ((("plain", "edgy"), 0), (("harmful",), 1)))
    if threshold:
        scores[f"{prefix}refusal_at_10"] = discrimination.refusal_at(kept, test, "r", "", seed=0).as_dict()
    origin = {name: {"command": "evaluate_refusal", "inputs": {"openers": openers}} for name in scores}
    return Measured(Path("x"), scores, rows, {}, 42, {key: "h" for key in rows}, origin)


def axes(*found):
    return {axis.score: axis for axis in refusal_axes(found, DISCRIMINATION)}


def drawn(rng, gap=1.5, n=60, prompts=0.8, seeds=3, count=1, **more):
    """For each of ``count`` models one run a seed; prompts differ by ``prompts`` of the spread, alike for all."""
    common = rng.normal(gap, prompts, n), rng.normal(0, prompts, n)
    rest = math.sqrt(1 - prompts**2)
    return [[run(*(part + rng.normal(0, rest, n) for part in common), **more) for _ in range(seeds)] for _ in range(count)]


def test_one_seed_is_the_paired_test_on_shared_prompts():
    (a,), (b,) = drawn(np.random.default_rng(1), seeds=1, count=2)
    found = axes(a, b)
    sides = [([x["score"] for (place, _), x in item.rows.items() if place == "refusal_harmful"],
              [x["score"] for (place, _), x in item.rows.items() if place != "refusal_harmful"]) for item in (a, b)]
    assert difference(a, b, found["refusal_auc"]) == discrimination.delong(*sides)
    # against the plain ones alone: sixty harmful, thirty harmless
    assert difference(a, b, found["refusal_auc_plain"]).n == 90
    assert difference(a, b, found["refusal_at_10"]).n == 30
    # a prompt that one of them lacks is left out of both
    fewer = replace(b, rows={key: value for key, value in b.rows.items() if key != ("refusal_harmful", "7")})
    assert difference(a, fewer, found["refusal_auc"]).n == 119


def test_what_cannot_be_compared_stays_empty():
    (a,), (b,) = drawn(np.random.default_rng(2), seeds=1, count=2)
    found = axes(a, b)
    other = replace(b, origin={name: {"command": "evaluate_refusal", "inputs": {"openers": "others"}} for name in b.scores})
    harmful = replace(b, rows={key: value for key, value in b.rows.items() if key[0] == "refusal_harmful"})
    for unlike in (other, harmful, replace(b, rows={}), replace(b, prompts={key: "another" for key in b.rows})):
        assert difference(a, unlike, found["refusal_auc"]) is None
        assert difference(a, unlike, found["refusal_at_10"]) is None
    halved = run(np.arange(60.0), np.arange(60.0), half=1)
    assert difference(halved, halved, found["refusal_at_10"]) is None


def test_files_of_a_user_have_axes_of_their_own():
    mine = run(np.arange(20.0) + 5, np.arange(20.0), prefix="mine.")
    found = axes(mine)
    assert list(found) == [f"mine.{name}" for name in DISCRIMINATION]
    assert [part.set for part in found["mine.refusal_auc"].parts] == [
        "mine.refusal_harmful", "mine.refusal_plain", "mine.refusal_edgy"]
    assert found["mine.refusal_auc"].title == "refusal AUC, mine ↑"
    assert refusal_axes([mine], ["refusal_at_10"])[0].kind == "threshold"
    assert refusal_axes([mine], []) == ()


def test_three_seeds_have_their_mean_and_both_spreads():
    (a, b) = drawn(np.random.default_rng(3), count=2)
    found = axes(*a, *b)
    values = [item.scores["refusal_auc"]["value"] for item in a]
    one = cell(a, found["refusal_auc"])
    assert one.value == pytest.approx(np.mean(values))
    assert one.low < one.value < one.high
    # a model whose seeds are one model: the prompts' spread alone is left
    same = cell([a[0]] * 3, found["refusal_auc"])
    single = a[0].scores["refusal_auc"]
    assert (same.low, same.high) == pytest.approx((single["low"], single["high"]))
    gap = over_seeds(a, b, found["refusal_auc"])
    pairs = [difference(x, y, found["refusal_auc"]).value for x, y in zip(a, b, strict=True)]
    assert gap.value == pytest.approx(np.mean(pairs))
    at = over_seeds(a, b, found["refusal_at_10"])
    # the thresholds' doubt counts whole: never less than one seed's own interval
    assert at.high - at.low >= np.mean([d.high - d.low for d in (
        difference(x, y, found["refusal_at_10"]) for x, y in zip(a, b, strict=True))]) - 1e-9


@pytest.mark.parametrize("prompts", [0.3, 0.9])
def test_intervals_over_seeds_cover(prompts):
    """Of 150 studies of two models without a difference, three seeds each; the AUC by its prompts' own part."""
    rng, studies, hits, both = np.random.default_rng(4), 150, 0, 0
    truth = float(stats.norm.cdf(1.5 / math.sqrt(2)))
    for _ in range(studies):
        a, b = drawn(rng, prompts=prompts, count=2, threshold=False)
        axis = axes(*a)["refusal_auc"]
        one, gap = cell(a, axis), over_seeds(a, b, axis)
        hits += one.low <= truth <= one.high
        both += gap.low <= 0 <= gap.high
    least = 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    assert hits / studies > least
    assert both / studies > least
