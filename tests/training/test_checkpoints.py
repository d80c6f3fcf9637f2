"""Checkpoints hold no pickle and restore optimiser and random states exactly."""

from __future__ import annotations

import random
import re
import shutil

import numpy as np
import pytest
import torch
from runs import align, write_data

from training.checkpoints import load_optimizer, load_rng, save_optimizer, save_rng


def test_optimizer_round_trip(tmp_path):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(layer, optimizer, scheduler, seed):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        scheduler.step()

    one = make()
    step(*one, 1)
    save_optimizer(tmp_path, one[1], one[2])
    two = make()
    two[0].load_state_dict(one[0].state_dict())
    load_optimizer(tmp_path, two[1], two[2])
    for trio in (one, two):
        step(*trio, 2)
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert one[2].state_dict() == two[2].state_dict()


def test_moments_that_lie_deeper_and_share_a_table_round_trip(tmp_path):
    """bitsandbytes' 8-bit Adam packs its moments so; a run ended in a traceback when its first checkpoint was written."""
    table = torch.linspace(-1, 1, 256)

    class EightBit:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return {"state": self.state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}

        def load_state_dict(self, found):
            self.state = found["state"]

    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda step: 1.0)
    moments = {i: {"step": 3, "packed": {"state1": torch.full((4,), i, dtype=torch.uint8), "qmap1": table}} for i in (0, 1)}
    save_optimizer(tmp_path, EightBit(moments), schedule)
    found = EightBit({})
    load_optimizer(tmp_path, found, schedule)
    assert found.state.keys() == moments.keys()
    for i, values in moments.items():
        assert found.state[i]["step"] == 3
        assert found.state[i]["packed"].keys() == values["packed"].keys()
        assert all(torch.equal(found.state[i]["packed"][name], tensor) for name, tensor in values["packed"].items())


def test_a_checkpoint_of_the_8_bit_optimiser_is_written_and_read(pico, tmp_path):
    pytest.importorskip("bitsandbytes")
    words = ("--moe_flag", "0", "--optim", "adamw_8bit", "--save_steps", "1", "--per_device_train_batch_size", "4")
    data = write_data(tmp_path / "data")
    whole = align(pico, tmp_path / "whole", data, "helpfulness", *words, "--max_steps", "3")
    align(pico, tmp_path / "cut", data, "helpfulness", *words, "--max_steps", "3")
    checkpoints = tmp_path / "cut" / "checkpoints" / "helpfulness"
    shutil.rmtree(tmp_path / "cut" / "outputs")
    shutil.rmtree(checkpoints / "checkpoint-3")
    again = align(pico, tmp_path / "cut", data, "helpfulness", *words, "--max_steps", "3")
    assert again["metrics"]["history"][-1]["loss"] == whole["metrics"]["history"][-1]["loss"]


@pytest.mark.parametrize(("words", "said"), [
    (("--adam_beta1", "2"), "--optim adamw_torch_fused: Invalid beta"),
    (("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"bogus": 1}'),
     "--lr_scheduler_type cosine_with_min_lr: .* unexpected keyword argument 'bogus'")])
def test_an_optimiser_that_cannot_be_made_is_a_sentence(pico, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        align(pico, tmp_path, write_data(tmp_path / "data"), "helpfulness", "--moe_flag", "0", "--max_steps", "1", *words)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "outputs" / "helpfulness").exists()


def test_random_states_round_trip(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    save_rng(tmp_path / "rng.safetensors")
    want = draw()
    draw()
    load_rng(tmp_path / "rng.safetensors")
    assert draw() == want


@pytest.mark.parametrize("flags", [("--method", "sft"), ("--method", "dpo")])
def test_nothing_is_pickled(pico, tmp_path, flags, monkeypatch):
    from data.records import Pair

    if "dpo" in flags:
        monkeypatch.setattr("data.sources.load_pairs",
                            lambda *a, **k: [Pair(f"q {i}", "good answer", "bad", 1) for i in range(8)])
    data = write_data(tmp_path / "data")
    found = align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--save_steps", "1", *flags)
    assert found["metrics"]["steps"] >= 1
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".md", ".jinja", ".arrow", ".lock"}, kinds
    assert list((tmp_path / "checkpoints").rglob("optimizer.safetensors"))


def test_checkpoints_of_another_configuration_are_refused(pico, tmp_path, capsys):
    import shutil

    data = write_data(tmp_path / "data")
    align(pico, tmp_path, data, "safety", "--moe_flag", "0")
    shutil.rmtree(tmp_path / "outputs" / "safety")
    with pytest.raises(SystemExit) as stop:
        align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--learning_rate", "0.5")
    assert stop.value.code == 2
    assert "holds checkpoints of another configuration" in capsys.readouterr().err


def test_dpo_learns_the_preference_and_keeps_the_reference(pico, tmp_path, monkeypatch):
    from data.records import Pair

    pairs = [Pair(f"question {i}", "I can't help with that", "Sure, here it is", 1) for i in range(16)]
    monkeypatch.setattr("data.sources.load_pairs", lambda *a, **k: pairs)
    found = align(pico, tmp_path, write_data(tmp_path / "data"), "safety", "--moe_flag", "0", "--method", "dpo",
                  "--learning_rate", "0.02", "--num_train_epochs", "4", "--warmup_steps", "0")
    history = found["metrics"]["history"]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1]["loss"] < 0.3
    assert history[-1]["rewards/accuracies"] == 1
    assert len(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == 1


def test_dpo_on_packed_batches_is_dpo_on_padded_ones(pico, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from data.records import Pair

    pairs = [Pair(f"question {i}" * (1 + i % 3), "No.", "Sure, here it is: " + "bread " * i, 1) for i in range(8)]
    monkeypatch.setattr("data.sources.load_pairs", lambda *a, **k: pairs)
    found = []
    for name in ("packed", "padded"):
        if name == "padded":
            monkeypatch.setattr("training.dpo.pack_forward", lambda model: False)
        made = align(pico, tmp_path / name, write_data(tmp_path / "data"), "safety", "--moe_flag", "0", "--method", "dpo",
                     "--learning_rate", "0.01", "--num_train_epochs", "2", "--warmup_steps", "0", "--logging_steps", "1")
        adapter = load_file(tmp_path / name / "outputs" / "safety" / "adapter_model.safetensors")
        found.append((made["metrics"]["history"], adapter))
    (packed, mine), (padded, theirs) = found
    assert len(packed) >= 2
    assert packed[0]["rewards/margins"] == 0, "the reference was not read as the policy is"
    for ours, other in zip(packed, padded, strict=True):
        for field in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy",
                      "logits/chosen"):
            assert ours[field] == pytest.approx(other[field], rel=1e-3, abs=1e-4), field
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], atol=2e-3, rtol=1e-2)
