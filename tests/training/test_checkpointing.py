"""--gradient_checkpointing changes memory and time, nothing else: an adapter below a bfloat16 base, and the fused MoE."""

from __future__ import annotations

import pytest
from runs import align, build_moe, losses, write_data

SHORT = ("--max_steps", "2", "--overwrite")
NO_DROPOUT = ("--lora_dropout", "0")


@pytest.mark.parametrize("words", [("--dtype", "bfloat16", *NO_DROPOUT), ("--dtype", "bfloat16", "--tuning", "full")])
def test_an_expert_trains_as_without_it(pico, tmp_path, words):
    data = write_data(tmp_path / "data")
    found = [losses(align(pico, tmp_path, data, "safety", "--moe_flag", "0", *words, *SHORT, "--gradient_checkpointing", on))
             for on in ("true", "false")]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_fused_moe_tunes_as_without_it(pico, tmp_path):
    data = write_data(tmp_path / "data")
    build_moe(pico, tmp_path, data)
    runs = [align(pico, tmp_path, data, "mix", "--moe_flag", "1", "--gate_loss_weight", "0.1", *SHORT, *NO_DROPOUT,
                  "--gradient_checkpointing", on) for on in ("true", "false")]
    for name in ("loss_lm", "loss_gate"):
        assert losses(runs[0], name) == pytest.approx(losses(runs[1], name), rel=1e-6)
