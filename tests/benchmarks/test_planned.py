"""The plan beside what torch's allocator gave out: every objective, real commands on a model of this test's size."""

from __future__ import annotations

import json

import pytest

from benchmarks.memory import planned


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every objective's row, measured in this process instead of one each."""
    file = tmp_path_factory.mktemp("planned") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "_in_a_process", lambda words, device: planned.measured(words, device))
        with pytest.raises(SystemExit) as ended:
            planned.main(["--json", str(file), "--steps", "2"])
    assert not ended.value.code
    return {row["training"]: row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("name", planned.CASES)
def test_the_plan_is_within_15_percent(rows, name):
    assert rows[name]["tensors"] > 1e6
    assert rows[name]["plan"] == pytest.approx(rows[name]["tensors"], rel=0.15)


def test_checkpointing_is_told_from_keeping(rows):
    """So that the bar is no matter of a constant: what differs in the measurement differs in the plan, by as much."""
    saved = {key: rows["sft"][key] - rows["sft checkpointing"][key] for key in ("plan", "tensors")}
    assert saved["tensors"] > 0
    assert saved["plan"] == pytest.approx(saved["tensors"], rel=0.6)


def test_an_unknown_objective_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        planned.main(["--only", "stf"])
    assert ended.value.code == 2
    assert "--only stf: not known" in capsys.readouterr().err
