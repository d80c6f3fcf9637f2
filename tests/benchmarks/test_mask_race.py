"""benchmarks/mask.py: both sides compute the same on the same noise, and a race without that is refused."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks import mask as race
from benchmarks.preference_pairs import LENGTHS, batches


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(race, "SHAPE", (32, 64, 4, 2, 96, 2))
    monkeypatch.setattr(race, "RANK", 4)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("tokens", [16, None])
def test_one_step_is_the_same_on_both_sides(mode, tokens):
    found = race.compare(mode, 2, batches(1, 2, tokens, 96)[0])
    assert found["loss"] < 1e-5
    assert found["gradient"] < race.TOLERANCE


def test_the_pairs_have_the_lengths_they_should():
    first, second = batches(2, 2, None, 96)
    prompts, chosen, rejected = zip(*LENGTHS[2:4], strict=True)
    assert (second["labels"] >= 0).sum(1).tolist() == [*chosen, *rejected]
    assert second["attention_mask"].sum(1).tolist() == [p + a for p, a in zip(prompts * 2, chosen + rejected, strict=True)]
    assert second["input_ids"].shape == (4, max(p + r for p, r in zip(prompts, rejected, strict=True)))
    for i, prompt in enumerate(prompts):
        assert torch.equal(second["input_ids"][i, :prompt], second["input_ids"][2 + i, :prompt])
    assert not torch.equal(first["input_ids"][0, :40], second["input_ids"][0, :40])
    short = batches(2, 2, None, 96, cut=128)[1]
    assert short["attention_mask"].sum(1).tolist() == [min(p + a, 128) for p, a in zip(prompts * 2, chosen + rejected,
                                                                                       strict=True)]
    assert batches(1, 3, 10, 96)[0]["attention_mask"].sum(1).tolist() == [10] * 6


def test_another_temperature_shows_as_another_gradient(monkeypatch):
    real = race.draw_and_merge

    def hotter(*args):
        monkeypatch.setattr(race, "TEMPERATURE", 1.0)
        found = real(*args)
        monkeypatch.setattr(race, "TEMPERATURE", 0.5)
        return found

    monkeypatch.setattr(race, "draw_and_merge", hotter)
    assert race.compare("full", 1, batches(1, 2, 16, 96)[0])["gradient"] > 0.05


@pytest.mark.parametrize("side", ["ours", "published"])
def test_a_run_prints_its_figures(side, capsys, monkeypatch):
    monkeypatch.setattr(race, "gemm", lambda device: 1e9)
    race.child(side, "lora", 1, 2, 1, 16, 512, 1, "none")
    found = json.loads(capsys.readouterr().out)
    assert len(found["all"]) == 3
    assert found["peak"] >= found["floor"] > 0
    # q, k, v, o of 32 x 32 and 16 x 32, three of 64 x 32, the head; A and B of q and v
    masked = 4 * (32 + 32) + 4 * (32 + 16)
    if side == "ours":
        body = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 6 * masked
        # one pair: a prompt of 8, two answers of 8
        assert found["work"] == body * 24 + 4 * 96 * 32 * 16
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
                "work": 160_000}

    monkeypatch.setattr(race, "run", run)
    found = race.race("full", argparse.Namespace(pairs=2, layers=1, batch=2, tokens=16, cut=512, threads=1, keep="ours",
                                                    device="cpu"))
    assert order == ["compare", "ours", "published", "ours", "published"]
    assert (found["ratio"], found["memory_ratio"]) == (4.0, 0.4)
    assert found["ratio_with_reference"] == pytest.approx(3.2)
    assert found["beyond_imports_ratio"] == pytest.approx(0.25)
    assert found["limit_seconds"] == pytest.approx(160_000 / 1e9)
    assert "| full | 2 | 1.00 | 4.00 | 4.0 | 3.2 | 3.0 | 3 |" in race.table([found])
