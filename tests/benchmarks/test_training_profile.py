"""The profile of a training step: its limit counts what a step must compute, its kinds are the profiler's own names."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import training_profile


@pytest.mark.parametrize("kind", ["sft", "moe"])
def test_the_limit_is_what_the_frozen_weights_need(kind):
    step, tokens, answers, operations = training_profile.objective(kind, rows=1)
    assert tokens > answers > 0
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counted:
        step()
    products = sum(event.flops or 0 for event in counted.key_averages() if training_profile.kind_of(event.key) == "products")
    # beside it: the factors of LoRA and experts, and the head's logits once more in the backward pass
    assert operations < products < 1.7 * operations


def test_operators_are_known_by_the_profilers_names():
    x = torch.randn(4, 4, requires_grad=True)
    shares = training_profile.profiled(lambda: float((torch.nn.functional.silu(x @ x) * x).softmax(-1).sum()))
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[kind] > 0 for kind in ("products", "attention", "elementwise", "sums"))
    assert [training_profile.kind_of(name) for name in ("aten::mm", "aten::mul_", "ExpertSumBackward")] == [
        "products", "elementwise", "other"]


def test_the_command_prints_and_writes_both(tmp_path, capsys):
    training_profile.main(["--rows", "1", "--rounds", "2", "--json", str(tmp_path / "profile.json")])
    written = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert [row["objective"] for row in written] == ["sft", "moe"]
    for row in written:
        speeds = [found["of_limit"] for found in row["rounds"]]
        assert len(speeds) == 2
        assert min(speeds) <= row["of_limit"] <= max(speeds) < 1
    assert capsys.readouterr().out.count("| sft |") == 1
