"""The memory of a tuning step, counted at a small shape: what each layer may keep, and that nothing outlives a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory import tuning_step
from benchmarks.memory.fake_step import Shape, moe_step

#: Wide beside its weights' number, so that activations stand out.
SMALL = Shape(layers=2, hidden=64, intermediate=4096, heads=4, vocabulary=128, rank=2, rows=8, tokens=64)
#: A bfloat16 tensor of (tokens, intermediate).
WIDE = SMALL.rows * SMALL.tokens * SMALL.intermediate * 2


def kept(checkpointing: bool) -> float:
    """(tokens, f) tensors that a further layer keeps of a forward pass: what grows with layers and with tokens."""
    held = {(layers, tokens): moe_step(replace(SMALL, layers=layers, tokens=tokens), checkpointing).after_forward
            for layers in (1, 3) for tokens in (32, 64)}
    return (held[3, 64] - held[1, 64] - held[3, 32] + held[1, 32]) / WIDE


def test_a_layer_keeps_gate_up_and_the_mask():
    # of the FFN; what attention, norms and factors keep is narrow, 64 of 4096 and less
    assert 3 <= kept(False) <= 3.6


def test_a_checkpointed_layer_keeps_its_input_alone():
    # (tokens, d) in bfloat16 is a 64th; the router's probabilities beside it
    assert kept(True) <= 0.04


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_outlives_a_step_but_the_optimiser(checkpointing):
    held = moe_step(SMALL, checkpointing)
    layers, experts, d, f, r = SMALL.layers, 3, SMALL.hidden, SMALL.intermediate, SMALL.rank
    trained = layers * (experts * 3 * r * (d + f) + 4 * 2 * r * d + experts * d)
    # two moments in fp32; a step counter each, and the batch itself
    assert 0 <= held.after_step - held.weights - 8 * trained < 20_000


def test_the_command_prints_and_writes_both(tmp_path, capsys, monkeypatch):
    # as where it is started by its path
    monkeypatch.syspath_prepend(Path(tuning_step.__file__).parent)
    tuning_step.main(["--layers", "3", "--hidden", "64", "--intermediate", "128", "--heads", "4", "--vocabulary", "128",
                      "--json", str(tmp_path / "m.json")])
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["checkpointing"] for row in rows] == [False, True]
    assert rows[1]["peak"] < rows[0]["peak"]
    assert "| yes |" in capsys.readouterr().out
