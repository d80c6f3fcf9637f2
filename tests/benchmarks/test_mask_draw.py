"""The benchmark of a mask's draws: it counts what it says, and its plan is the training's."""

from __future__ import annotations

import json

import pytest

from benchmarks.memory import mask_draw


def test_a_small_run_counts_operators(tmp_path, capsys):
    file = tmp_path / "rows.json"
    mask_draw.main(["--shape", "pico", "--steps", "1", "--paths", "operations", "--json", str(file)])
    element, row = json.loads(file.read_text())
    assert (element["granularity"], row["granularity"]) == ("element", "row")
    assert element["tensors"] == 14
    assert element["masked"] == 2 * (4 * 64 * 64 + 3 * 64 * 160)
    for name in ("draw", "gradient", "step"):
        assert element["kernels"][name] > 3
        assert element["seconds"][name] > 0
    # today's operations ask the device for each mask's mean, and again for its gradient
    assert element["waits"]["draw"] >= 1
    assert "operators a tensor" in capsys.readouterr().out


def test_at_7b_an_entry_holds_14_bytes_and_6_by_row():
    for granularity, least, most in (("element", 14.0, 14.2), ("row", 6.0, 6.2)):
        plan = mask_draw.plan_of(mask_draw.specs_of("7b", 32, granularity), 2)
        assert plan.masked == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert least <= plan.total / plan.masked <= most


def test_unknown_words_are_said(capsys):
    with pytest.raises(SystemExit) as ended:
        mask_draw.main(["--granularities", "rows"])
    assert ended.value.code == 2
    assert "--granularities element" in capsys.readouterr().err
