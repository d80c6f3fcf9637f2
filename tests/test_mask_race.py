"""benchmarks/mask.py: both sides compute the same on the same noise, and a race without that is refused."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import mask as race


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(race, "SHAPE", (32, 64, 4, 2, 96, 2))
    monkeypatch.setattr(race, "RANK", 4)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_one_step_is_the_same_on_both_sides(mode):
    found = race.compare(mode, 2, race.batches(1, 2, 16)[0])
    assert found["loss"] < 1e-5
    assert found["gradient"] < race.TOLERANCE


def test_another_temperature_shows_as_another_gradient(monkeypatch):
    real = race.draw_and_merge

    def hotter(*args):
        monkeypatch.setattr(race, "TEMPERATURE", 1.0)
        found = real(*args)
        monkeypatch.setattr(race, "TEMPERATURE", 0.5)
        return found

    monkeypatch.setattr(race, "draw_and_merge", hotter)
    assert race.compare("full", 1, race.batches(1, 2, 16)[0])["gradient"] > 0.05


@pytest.mark.parametrize("side", ["ours", "published"])
def test_a_run_prints_its_figures(side, capsys, monkeypatch):
    monkeypatch.setattr(race, "gemm", lambda: 1e9)
    race.child(side, "lora", 1, 2, 1, 16, 1, "none")
    found = json.loads(capsys.readouterr().out)
    assert len(found["all"]) == 3
    assert found["peak"] >= found["floor"] > 0
    # q, k, v, o of 32 x 32 and 16 x 32, three of 64 x 32, the head; A and B of q and v
    masked = 4 * (32 + 32) + 4 * (32 + 16)
    if side == "ours":
        assert found["masked_products"] == masked
        assert found["products"] == masked + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 96 * 32
        assert found["reference"] > 0


def test_sides_that_differ_are_not_raced(monkeypatch):
    started = []

    def run(side, mode, args):
        started.append(side)
        return {"loss": 0.0, "gradient": float("nan")}

    monkeypatch.setattr(race, "run", run)
    with pytest.raises(SystemExit, match="do not compute the same"):
        race.race("full", argparse.Namespace(pairs=1))
    assert started == ["compare"]


def test_the_figures_of_a_race(monkeypatch):
    order = []

    def run(side, mode, args):
        order.append(side)
        if side == "compare":
            return {"loss": 0.0, "gradient": 1e-6}
        mine = side == "ours"
        return {"seconds": 1.0 if mine else 4.0, "cpu": 1.0 if mine else 3.0, "peak": (2 if mine else 5) * race.GIB,
                "floor": race.GIB, "gemm": 1e9, "reference": 0.25, "plans": {"float32": 28, "bfloat16": 14},
                "products": 1000, "masked_products": 500}

    monkeypatch.setattr(race, "run", run)
    found = race.race("full", argparse.Namespace(pairs=2, layers=1, batch=2, tokens=16, threads=1, keep="ours"))
    assert order == ["compare", "ours", "published", "ours", "published"]
    assert (found["ratio"], found["memory_ratio"]) == (4.0, 0.4)
    assert found["ratio_with_reference"] == pytest.approx(3.2)
    assert found["beyond_imports_ratio"] == pytest.approx(0.25)
    assert found["limit_seconds"] == pytest.approx((4 * 1000 + 2 * 500) * 64 / 1e9)
    assert "| full | 2 | 1.00 | 4.00 | 4.0 | 3.2 | 3.0 | 3 |" in race.table([found])
