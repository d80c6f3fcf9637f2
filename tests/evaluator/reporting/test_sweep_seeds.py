"""Sweeps over seeds: seeds crossed with prompts where the rows are there, corrected comparisons, simulated coverage."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

import manifest
from errors import UserError
from evaluator.reporting.sweeps import curve as sweep
from evaluator.reporting.sweeps import report as sweep_report
from evaluator.reporting.sweeps import seeds as sweep_seeds
from evaluator.reporting.sweeps.curve import Point
from evaluator.statistics import crossed, metrics

LAMBDAS = np.arange(0, 1.01, 0.25)
#: What each lambda truly does, and a control that does as well as the curve at its compliance.
HARM, COMPLY = np.array([0.9, 0.75, 0.6, 0.45, 0.3]), np.array([0.95, 0.9, 0.8, 0.7, 0.6])
LEVEL, BEST = 0.75, 0.525
FACTS = {"task": "t", "safety": "s", "form": "convex", "style": "none", "utility": "english", "refinement": [],
         "stopped": "", "sets": ["safety", "overrefusal"]}
EASY = [np.random.default_rng(number).normal(size=80) * math.sqrt(0.5) for number in (8, 9)]


def points(rng, easy, shift):
    """Five lambdas and a control; prompts are easy for all seeds (``easy``), a seed shifts every model."""
    def answers(chances, part):
        drawn = easy[part] + rng.normal(size=(len(chances), len(easy[part]))) * math.sqrt(0.5)
        return (drawn < (stats.norm.ppf(chances) + shift)[:, None]).astype(int)
    harms, complies = answers(np.append(HARM, BEST), 0), answers(np.append(COMPLY, LEVEL), 1)
    return [Point(f"lambda {w:g}" if w == w else "joint", f"r{w:g}", w, {str(i): int(v) for i, v in enumerate(h)},
                  {str(i): int(v) for i, v in enumerate(c)})
            for w, h, c in zip([*LAMBDAS, math.nan], harms, complies, strict=True)]


def parts_of(found, seed):
    """A seed's report, and the answers behind it."""
    gap = sweep.at_equal_compliance(found[:-1], found[-1], seed)
    part = {"seed": seed, "compared": [{"group": "control", "label": "joint",
                                        "gap": sweep_report.plain(vars(gap)) if gap else None}],
            "rows": [{"label": p.label, "group": "fusion", "non_refusal": sweep.non_refusal(p).as_dict()}
                     for p in found[:-1]]}
    return part, {("fusion" if p.weight == p.weight else "control", p.label): p for p in found}


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_sweeps_over_seeds_cover(spread):
    draws, n, rng = 80, 60, np.random.default_rng(int(10 * spread))
    rate = float(np.mean(stats.norm.cdf(stats.norm.ppf(HARM[2]) + spread * rng.normal(size=20_000))))
    held = {"non_refusal": 0, "whole": 0, "gap": 0}
    made = 0
    for _ in range(draws):
        easy = [rng.normal(size=n) * math.sqrt(0.5) for _ in range(2)]
        seeds = [parts_of(points(rng, easy, spread * rng.normal()), seed) for seed in range(3)]
        reports, models = zip(*seeds, strict=True)
        harms = [part["rows"][2]["non_refusal"] for part in reports]
        own = [mine["fusion", "lambda 0.5"] for mine in models]
        crossed_share = sweep_seeds._share(harms, own, lambda model: model.non_refusal)
        for name, share in (("non_refusal", crossed_share), ("whole", 1.0)):
            _, low, high = sweep_seeds._over_seeds(harms, share)
            held[name] += low <= rate <= high
        if gap := sweep_seeds._gaps(reports, models)[0]["gap"]:
            made += 1
            # the control lies on the curve in every seed: all models are shifted alike
            held["gap"] += gap["low"] <= 0 <= gap["high"]
    least = 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)
    assert held["non_refusal"] / draws >= least
    assert held["whole"] >= held["non_refusal"]
    assert held["gap"] / made >= least


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three finished sweeps of three points and two controls, their rows in files as the evaluators write them."""
    home = tmp_path_factory.mktemp("sweeps")
    for seed in range(3):
        folder = home / str(seed)
        found = points(np.random.default_rng(seed), EASY, 0.0)
        facts = FACTS | {"seed": seed}
        rows = {"fusion": found[:-1], "control": [found[-1]]}
        sweep_report.write(folder / "report", "x", sweep_report.summary(rows, {}, facts, seed))
        for p in found:
            lines = [{"set": "safety", "id": id, "values": {"safe_refusal": 1 - v}} for id, v in p.non_refusal.items()]
            lines += [{"set": "overrefusal", "id": id, "values": {"refusal": 1 - v}} for id, v in p.comply.items()]
            file = folder / "scores" / f"cross_{p.run}" / "evaluate_safety.rows.jsonl"
            file.parent.mkdir(parents=True)
            file.write_text("\n".join(map(json.dumps, lines)))
            manifest.register(folder, {"kind": "score", "run": p.run, "sub": f"cross_{p.run}", "command": "evaluate_safety",
                                       "scores": {}, "seed": seed})
    return home


@pytest.fixture
def seeds(written, tmp_path):
    """Copies of them, for a test to break."""
    return [shutil.copytree(written / str(seed), tmp_path / str(seed)) for seed in range(3)]


def test_rows_on_disk_narrow_the_interval_to_the_crossed_one(seeds):
    found = sweep_seeds.over_seeds(seeds, "x")
    files = [json.loads((folder / "report" / "x.json").read_text()) for folder in seeds]
    harms = [file["rows"][1]["non_refusal"] for file in files]
    tables = [list(points(np.random.default_rng(seed), EASY, 0.0)[1].non_refusal.values()) for seed in range(3)]
    shared = crossed.common_share([np.array(tables, float)])
    assert 0 < shared < 1
    value, low, high = crossed.over_seeds([(h["value"], h["low"], h["high"]) for h in harms], shared)
    row = next(row["non_refusal"] for row in found["rows"] if row["label"] == "lambda 0.25")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((value, low, high))
    assert found["crossed"]
    text = "\n".join(sweep_report.markdown(found, "x"))
    assert "crossed seeds and prompts)" in text
    # without the rows both spreads are whole, and the report says so
    (seeds[2] / "registry.jsonl").unlink()
    wide = sweep_seeds.over_seeds(seeds, "x")
    again = next(row["non_refusal"] for row in wide["rows"] if row["label"] == "lambda 0.25")
    assert again["high"] - again["low"] > row["high"] - row["low"]
    assert not wide["crossed"]
    assert "rows of a seed are missing" in "\n".join(sweep_report.markdown(wide, "x"))


def test_scores_made_again_since_the_report_do_not_narrow_it(seeds):
    before = sweep_seeds.over_seeds(seeds, "x")["rows"][0]["non_refusal"]
    file = seeds[0] / "scores" / "cross_r0" / "evaluate_safety.rows.jsonl"
    file.write_text(file.read_text().replace('"safe_refusal": 0', '"safe_refusal": 1'))
    after = sweep_seeds.over_seeds(seeds, "x")["rows"][0]["non_refusal"]
    assert after["value"] == before["value"]
    assert after["high"] - after["low"] > before["high"] - before["low"]


def test_comparisons_are_corrected_and_the_uncorrected_value_stands_beside():
    gaps = [{"value": -0.2, "low": -0.35, "high": -0.05, "p": p} for p in (0.03, 0.001, 0.9)]
    gaps[2] |= {"low": -0.5, "high": 0.1}
    rows = sweep_report.corrected([{"group": "control", "label": f"c{i}", "gap": gap} for i, gap in enumerate(gaps)]
                                  + [{"group": "control", "label": "far", "gap": None}])
    assert [row["gap"]["holm"] for row in rows[:3]] == pytest.approx([0.06, 0.003, 0.9])
    lines = sweep_report._compared(rows)
    assert ("| c0 | -0.200 [-0.350, -0.050] | 0.030 | 0.060 | no difference (before the correction: fusion is better) |"
            in lines)
    assert "| c1 | -0.200 [-0.350, -0.050] | 0.001 | 0.003 | fusion is better |" in lines
    assert "| c2 | -0.200 [-0.500, 0.100] | 0.900 | 0.900 | no difference |" in lines
    assert lines[-1].startswith("| far |  |  |  | not comparable")


def test_over_seeds_the_p_is_that_of_the_crossed_interval(seeds):
    (row,) = sweep_seeds.over_seeds(seeds, "x")["compared"]
    gap = row["gap"]
    assert gap["holm"] == gap["p"]
    assert (gap["p"] < 1 - metrics.CONFIDENCE) == (gap["low"] > 0 or gap["high"] < 0)


@pytest.mark.parametrize(("path", "value"), [
    ((), "{"), ((), "[]"), ((), "{}"), ((), "[" * 100_000), (("rows",), 3), (("rows", 0), []),
    (("rows", 0, "non_refusal"), 3),
    (("rows", 0, "label"), None), (("rows", 0, "weight"), "x"), (("rows", 0, "non_refusal", "value"), "x"),
    (("rows", 0, "non_refusal", "low"), math.inf), (("rows", 0, "judged"), {"a": {"value": "x"}}), (("styles",), {"a": 3}),
    (("styles",), {"a": [3]}), (("cliff",), []), (("cliff", "half"), "x"), (("cliff", "drop"), None),
    (("cliff", "bracket"), [1]), (("compared", 0), 3), (("compared", 0, "gap"), {}), (("compared", 0, "gap"), []),
    (("compared", 0, "gap", "value"), math.nan), (("seed",), "<b>"), (("utility",), [])])
def test_a_report_that_no_sweep_wrote_is_named(seeds, path, value):
    file = seeds[1] / "report" / "x.json"
    content = json.loads(file.read_text())
    if path:
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    file.write_text(json.dumps(content) if path else value)
    with pytest.raises(UserError, match="no report of scripts/sweep.py, or damaged"):
        sweep_seeds.over_seeds(seeds, "x")


def test_one_folder_is_no_second_seed(seeds):
    with pytest.raises(UserError, match="named twice"):
        sweep_seeds.over_seeds([seeds[0], seeds[1], seeds[0] / ".." / "0"], "x")
