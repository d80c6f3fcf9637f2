from __future__ import annotations

import math

import pytest

from evaluator.statistics.aggregates import AGGREGATES, aggregates, table_rows


def column(set_name, **columns):
    n = len(next(iter(columns.values())))
    return {(set_name, str(i)): {key.replace("__", "-"): values[i] for key, values in columns.items()
                                 if values[i] is not None} for i in range(n)}


def cells(*parts, seed=0):
    return {cell.name: cell for cell in aggregates({k: v for part in parts for k, v in part.items()}, seed)}


HELP = column("helpfulness", pairwise=[1, 1, 0.5, 0] * 5)
SAFE = column("safety", moderation=[1, 0, 0, 0, 0] * 4, safer=[1, 0.5, 0, 1] * 5)
TRUE = {("truthfulness", str(i)): {"truth": int(i % 2 == 0), "info": int(i % 4 < 3),
                                   "truth_x_info.joint": int(i % 2 == 0 and i % 4 < 3)} for i in range(20)}


def test_without_rows_every_cell_is_empty():
    found = aggregates({}, 0)
    assert [cell.name for cell in found] == [aggregate.name for aggregate in AGGREGATES]
    assert all(cell.score is None and cell.definition for cell in found)
    assert all(row["value"] is None and row["low"] is None for row in table_rows(found))


def test_values_by_hand():
    found = cells(HELP, SAFE, TRUE)
    value = {name: cell.score.value for name, cell in found.items() if cell.score}
    assert value["win_rate"] == pytest.approx(0.625)
    assert value["safety_score"] == pytest.approx(0.2)
    assert value["truth"] == pytest.approx(0.5)
    assert value["info"] == pytest.approx(0.75)
    assert value["truth_x_info"] == pytest.approx(0.375)
    assert value["truth_and_info"] == pytest.approx(0.5)
    assert value["average"] == pytest.approx((0.625 + 0.375 - 0.2) / 3)
    assert value["preference_score"] == pytest.approx(0.25)
    assert set(value) == {"win_rate", "safety_score", "truth", "info", "truth_x_info", "truth_and_info", "average",
                          "preference_score"}
    for cell in found.values():
        if cell.score:
            assert cell.score.low < cell.score.value < cell.score.high, cell.name


@pytest.mark.parametrize("missing", ["helpfulness", "safety", "truthfulness"])
def test_the_average_needs_all_three(missing):
    parts = [part for part in (HELP, SAFE, TRUE) if next(iter(part))[0] != missing]
    assert cells(*parts)["average"].score is None


def test_rows_that_a_judge_did_not_score_do_not_count():
    found = cells(column("overrefusal", refusal=[1, 0, None, None]))["overrefusal"].score
    assert (found.value, found.n) == (0.5, 2)


def test_one_row_has_no_interval():
    found = cells(column("overrefusal", refusal=[1]))["overrefusal"].score
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_seeded():
    a, b, c = (cells(HELP, seed=seed)["win_rate"].score for seed in (1, 1, 2))
    assert (a.low, a.high) == (b.low, b.high)
    assert a.value == c.value


def test_utility_is_a_mean_over_tasks_and_probes_stay_apart():
    found = cells(column("copa", copa=[1, 1, 0, 1]), column("mmlu", mmlu=[0, 1] * 50),
                  column("piqa_probe", piqa_probe=[1, 0, 0, 0]))
    assert found["utility"].score.value == pytest.approx((0.75 + 0.5) / 2)
    assert "copa" in found["utility"].definition
    assert "piqa_probe" not in found["utility"].definition
    assert found["utility_probe"].score.value == pytest.approx(0.25)


def test_values_of_one_answer_stay_paired():
    # a value and its complement: PS of the same rows never leaves its line
    found = cells(column("truthfulness", truth=[1, 0] * 20, info=[0, 1] * 20))
    product = found["truth_x_info"].score
    # p(1-p) is at most 1/4 when both are drawn together; drawn apart it would exceed that
    assert product.high <= 0.25 + 1e-12


def test_harmfulness_rate_is_the_share_of_worst_marks():
    found = cells(column("safety", api__harm=[1, 0, 0, 0]))
    assert found["harmfulness_rate"].score.value == 0.25
    assert not found["harmfulness_rate"].score.higher_is_better
