"""benchmarks/moe.py: every side computes the same function, back ends keep their own setting, memory is counted."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import growth
from benchmarks import moe as race
from benchmarks import moe_sides as sides
from models.moe.packed import PackedMoe

SMALL = ("moe.py", "--hidden", "16", "--width", "24", "--pairs", "1", "--threads", "1")


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    # as where the race is started by its path; and no process keeps the race's allocator settings
    monkeypatch.setitem(sys.modules, "moe_sides", sides)
    monkeypatch.setitem(sys.modules, "growth", growth)
    monkeypatch.setattr("runtime.keep_freed_memory", lambda: None)
    monkeypatch.setattr(sides, "SAMPLE_SECONDS", 0)


def made(tuned=False, dtype=torch.float32):
    return sides.make(16, 24, 3, 2, 4, dtype, "cpu", tuned)


def test_every_side_computes_the_same_function():
    moe, x = made(), torch.randn(9, 16)
    blocks = sides.mixtral(moe)
    for name, side in {"packed": PackedMoe(made()), "tuned": made(tuned=True),
                       "loop": sides.published_loop(blocks["eager"], 2),
                       **{name: (lambda x, block=block: block(x[None])[0]) for name, block in blocks.items()}}.items():
        assert sides.error_of(side, moe, x) < 1e-5, name
    # another function is told from it
    assert sides.error_of(sides.dense_ffn(moe)[0], moe, x) > 0.01


def test_every_block_has_a_configuration_of_its_own():
    blocks = sides.mixtral(made())
    assert {name: block.experts.config._experts_implementation for name, block in blocks.items()} == {
        name: name for name in sides.BACKENDS}
    assert len({block.experts.gate_up_proj.data_ptr() for block in blocks.values()}) == 1


def test_backward_reaches_what_trains():
    moe, x = made(tuned=True), torch.randn(9, 16)
    trained = [p for n, p in moe.named_parameters() if "tuned_" in n or n == "router"]
    found = sides.backward(moe, trained, x)()
    assert [g.shape for g in found] == [x.shape, *(p.shape for p in trained)]
    side, lora = sides.dense_ffn(moe, 4)
    assert len(lora) == 6
    assert all(g is not None for g in sides.backward(side, lora, x)())


def test_peak_counts_what_is_alive_at_once():
    x = torch.zeros(1000)

    def call():
        for _ in range(5):
            y = x + 1
            z = y * 2
            del y
        return z.add_(1).view(10, 100)

    # y and z, while the z of the turn before has not been replaced yet
    assert sides.peak_bytes(call, "cpu") == 3 * 4000


def test_a_race_as_json(tmp_path, monkeypatch, capsys):
    file = tmp_path / "race.json"
    monkeypatch.setattr(sys, "argv", [*SMALL, "--rank", "2", "--tokens", "1,5", "--dtype", "float32", "--json", str(file)])
    monkeypatch.setattr(sides, "limits", lambda dtype, device: (1e9, 1e9))
    race.main()
    found = json.loads(file.read_text())
    assert [(r["tokens"], r["direction"]) for r in found["rows"]] == [
        (1, "forward"), (5, "forward"), (5, "forward+backward")]
    for row in found["rows"]:
        assert set(row["seconds"]) == {"ours", "dense", "loop", *sides.BACKENDS}
        assert row["outputs_equal"]
        assert row["ours_to_dense"] == pytest.approx(row["seconds"]["ours"] / row["seconds"]["dense"])
        assert row["peak_bytes"]["ours"] > 0
    # one token: the weights once, 3 d f of 4 bytes; five: 6 d f each
    assert found["rows"][0]["limit_seconds"] == pytest.approx(3 * 16 * 24 * 4 / 1e9)
    assert found["rows"][1]["limit_seconds"] == pytest.approx(5 * 6 * 16 * 24 / 1e9)
    assert found["rows"][0]["bar_to_dense"] == 1.2
    ours = 3 * 16 * 24 + 3 * 3 * 2 * (16 + 24) + 3 * 16
    assert found["weight_bytes"] == 4 * ours
    assert found["materialised_bytes"] == 4 * (3 * 3 * 16 * 24 + 3 * 16)
    assert "| 5 | forward+backward |" in capsys.readouterr().out


def test_growth_as_json_and_picture(tmp_path, monkeypatch):
    file = tmp_path / "growth.json"
    monkeypatch.setattr(race, "GROWTH", {"tokens": (1, 2, 4, 8), "experts": (2, 3, 4)})
    monkeypatch.setattr(sides, "limits", lambda dtype, device: (1e3, 1e12))
    monkeypatch.setattr(sys, "argv", [*SMALL, "--growth", str(file)])
    race.main()
    axes = json.loads(file.read_text())["axes"]
    assert [p["tokens"] for p in axes["tokens"]["points"]] == [1, 2, 4, 8]
    # the limit of products grows with tokens, and not with experts
    assert axes["tokens"]["slopes"]["limit"] == pytest.approx(1)
    assert axes["experts"]["slopes"]["limit"] == pytest.approx(0)
    assert file.with_suffix(".png").stat().st_size > 1000
