"""refusal_auc_length: prompts matched in length, so that a rule that reads nothing tells nothing apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from data.records import Record
from data.sets import refusal_prompts
from data.sets.refusal_prompts import EQUAL_LENGTH, Prompt, equal_lengths
from evaluator.scoring.refusals import endpoints
from evaluator.statistics import discrimination
from evaluator.statistics.axes import Measured, refusal_axes
from evaluator.statistics.comparison import difference, over_seeds
from tests.assets_fixture import require_embedded


def prompts_of(harmful, plain, edgy=()):
    """Prompts of these lengths."""
    return [Prompt(Record("x" * size, "", 1, id=f"{name}-{i}"), name, ("validation", "test")[i % 2])
            for name, sizes in (("harmful", harmful), ("plain", plain), ("edgy", edgy)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(8))
def test_as_many_pairs_as_there_can_be(seed):
    rng = np.random.default_rng(seed)
    prompts = prompts_of(rng.integers(20, 80, 25), rng.integers(15, 60, 12), rng.integers(15, 60, 9))
    found = equal_lengths(prompts)
    sizes = [(len(a.record.question), len(b.record.question)) for a, b in found]
    assert all(max(pair) <= min(pair) * (1 + EQUAL_LENGTH) for pair in sizes)
    ids = [p.record.id for pair in found for p in pair]
    assert len(set(ids)) == len(ids)
    assert all((a.set, b.set) in (("harmful", "plain"), ("harmful", "edgy")) for a, b in found)
    sides = [[len(p.record.question) for p in prompts if (p.set == "harmful") == harmful] for harmful in (True, False)]
    fits = np.array([[max(a, b) <= min(a, b) * (1 + EQUAL_LENGTH) for b in sides[1]] for a in sides[0]])
    best = fits[linear_sum_assignment(fits, maximize=True)].sum()
    assert len(found) == best


@pytest.mark.parametrize("split", ["test", "validation"])
def test_length_tells_the_embedded_prompts_apart_and_not_those_of_equal_length(split):
    require_embedded()
    prompts = refusal_prompts.load(split=split)
    rule = endpoints.by_length(prompts, "", 42)
    assert len(equal_lengths(prompts)) > 100
    assert rule["refusal_auc"] > 0.65
    assert abs(rule["refusal_auc_length"] - 0.5) < 0.02


def measured_of(marks, prompts):
    lines = endpoints.given(prompts, marks, "")
    scores = {score.name: score.as_dict() for score in endpoints.scores(lines, "", 42)[0]}
    return Measured(Path("here"), scores, {(line["set"], line["id"]): line["values"] for line in lines}, {}, 42)


def test_the_score_and_its_comparison_are_on_the_matched_prompts_alone():
    rng = np.random.default_rng(1)
    prompts = prompts_of(rng.integers(40, 90, 40), rng.integers(20, 60, 25), rng.integers(20, 60, 25))
    harmful = np.array([p.set == "harmful" for p in prompts])
    twins = {p.record.id for pair in equal_lengths(prompts) for p in pair}
    kept = np.array([p.record.id in twins for p in prompts])
    marks = [np.round(rng.normal(harmful * apart), 6) for apart in (2.0, 0.5)]
    a, b = (measured_of(mark, prompts) for mark in marks)
    sides = [[mark[harmful & kept], mark[~harmful & kept]] for mark in marks]
    assert a.scores["refusal_auc_length"]["value"] == discrimination.auc(*sides[0], "", "").value
    assert a.scores["refusal_auc_length"]["n"] == kept.sum() < len(prompts)
    (axis,) = refusal_axes([a, b], ["refusal_auc_length"])
    assert axis.title == "refusal AUC, equal length ↑"
    wanted = discrimination.delong(*map(tuple, sides))
    assert difference(a, b, axis) == wanted
    # several seeds: on the same prompts
    assert over_seeds([a, a, a], [b, b, b], axis).value == pytest.approx(wanted.value)


def test_too_few_twins_give_no_score():
    prompts = prompts_of([100] * 30, [40] * 30 + [100] * 9)
    scores, details = endpoints.scores(endpoints.given(prompts, np.arange(69.0), ""), "", 42)
    assert "refusal_auc_length" not in {score.name for score in scores}
    assert details["equal_length"] == 9
