"""Intervals of the papers' summary numbers, for one seed and over seeds, and of seeds crossed with prompts: simulations."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from evaluator.statistics import aggregates, crossed, metrics
from evaluator.statistics.axes import Measured

wilson = lru_cache(maxsize=None)(metrics.wilson)
#: Rows of each set, and how often a comparison is a tie.
ROWS, TIES = {"helpfulness": 50, "safety": 80, "truthfulness": 80}, 0.2


def seed_of(rng, levels, by_seed, prompts):
    """One seed's rows: a value is 1 where level + seed + prompt + rest is above 0; truth and info share their prompts."""
    values = {}
    for (place, key), level in levels.items():
        shift = by_seed * rng.normal()
        values[place, key] = (level + shift + prompts[place] + 0.7 * rng.normal(size=ROWS[place]) > 0).astype(float)
    wins = values["helpfulness", "pairwise"]
    values["helpfulness", "pairwise"] = np.where(rng.random(len(wins)) < TIES, 0.5, wins)
    rows = {}
    for (place, key), found in values.items():
        for i, value in enumerate(found):
            rows.setdefault((place, str(i)), {})[key] = value
    return Measured(None, {}, rows, {}, 0)


LEVELS = {"common": (0.3, -0.8, 0.2, 1.0), "rare": (2.6, -2.6, 0.2, 2.9)}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(("seeds", "by_seed"), [(1, 0.0), (3, 0.3)])
def test_summary_numbers_cover(monkeypatch, name, seeds, by_seed):
    monkeypatch.setattr(aggregates, "_RESAMPLES", 200)
    keys = (("helpfulness", "pairwise"), ("safety", "moderation"), ("truthfulness", "truth"), ("truthfulness", "info"))
    levels, draws = dict(zip(keys, LEVELS[name], strict=True)), 100
    rng = np.random.default_rng([seeds, len(name)])
    whole = math.sqrt(by_seed**2 + 1 + 0.49)
    wins, flagged = (float(stats.norm.cdf(level / whole)) for level in LEVELS[name][:2])
    # a seed's product, mean over seeds
    truth, info = (stats.norm.cdf((level + by_seed * rng.normal(size=50_000)) / math.sqrt(1.49))
                   for level in LEVELS[name][2:])
    wins, product = (1 - TIES) * wins + TIES / 2, float((truth * info).mean())
    truths = {"win_rate": wins, "safety_score": flagged, "truth_x_info": product, "average": (wins + product - flagged) / 3}
    held = dict.fromkeys(truths, 0)
    for _ in range(draws):
        prompts = {place: rng.normal(size=n) for place, n in ROWS.items()}
        found = aggregates.over_seeds([seed_of(rng, levels, by_seed, prompts) for _ in range(seeds)])
        for number, value in truths.items():
            held[number] += found[number].low <= value <= found[number].high
    assert all(count / draws >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws) for count in held.values()), held


#: Level and spread of seeds (prompts 1, rest 0.7 on the same scale); how often the interval holds the truth at least.
SEEDS = {"seeds equal": (0.0, 0.0, 0.95), "a quarter of the prompts' spread": (-1.2, 0.25, 0.95), "half": (0.0, 0.5, 0.95),
         "as much as prompts": (0.0, 1.0, 0.93), "as much, one in five": (-1.2, 1.0, 0.89), "rare": (-2.6, 0.25, 0.95),
         "very rare": (-3.4, 0.0, 0.95), "rare and seeds far apart": (-2.6, 1.0, 0.78)}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("name", SEEDS)
def test_seeds_crossed_with_prompts_cover(name, seeds):
    level, by_seed, least = SEEDS[name]
    draws, prompts, rng = 400, 100, np.random.default_rng([len(name), seeds])
    truth, held = stats.norm.cdf(level / math.sqrt(by_seed**2 + 1.49)), 0
    for _ in range(draws):
        table = level + by_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, prompts)) \
            + 0.7 * rng.normal(size=(seeds, prompts)) > 0
        found = [(float(row.mean()), *wilson(int(row.sum()), prompts)) for row in table]
        _, low, high = crossed.over_seeds(found, crossed.common_share([table.astype(float)]))
        held += low <= truth <= high
    assert held / draws >= least - 3 * math.sqrt(least * (1 - least) / draws)


def test_moves_are_what_a_row_adds_to_a_mean_and_to_a_product():
    rows = {("truthfulness", str(i)): {"truth": int(i < 6), "info": int(i < 8)} for i in range(10)}
    mean, product = (next(a for a in aggregates.AGGREGATES if a.name == name) for name in ("truth", "truth_x_info"))
    (place,) = {name for name, _ in mean.candidates[-1]}
    found = aggregates.moves(mean, ((place, "truth"),), rows)["truthfulness"]
    assert found["0"] == pytest.approx(1 - 0.6)
    assert found["9"] == pytest.approx(-0.6)
    both = aggregates.moves(product, ((place, "truth"), (place, "info")), rows)["truthfulness"]
    # 9 (0.48 - 5/9 * 7/9) without a row that has both
    assert both["0"] == pytest.approx(9 * (0.48 - 35 / 81))


def test_answers_that_every_seed_gives_alike_count_once():
    rows = {("safety", str(i)): {"moderation": int(i < 20)} for i in range(100)}
    one, three = (aggregates.over_seeds([Measured(None, {}, rows, {}, 1)] * n)["safety_score"] for n in (1, 3))
    assert (one.low, one.high) == pytest.approx(metrics.wilson(20, 100))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    # a fifth of the answers in each, of no prompt twice
    apart = [{("safety", str(i)): {"moderation": int(i % 5 == s)} for i in range(100)} for s in range(3)]
    found = aggregates.over_seeds([Measured(None, {}, rows, {}, 1) for rows in apart])["safety_score"]
    assert found.high - found.low < one.high - one.low
