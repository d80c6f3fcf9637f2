"""A mask whose logits train in bfloat16: it follows the one in float32, and a killed run ends as the uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from methods import make_place, train, weights
from transformers import Trainer

NARROW = ("--logit_dtype", "bfloat16", "--learning_rate", "0.02", "--max_steps", "6", "--save_steps", "2")


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return make_place(pico, tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def whole(pico, place, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "results"
    train(pico, place, out, "mask", *NARROW)
    return weights(out, "mask")


def flat(logits):
    return torch.cat([logits[name].float().reshape(-1) for name in sorted(logits)])


def test_it_follows_float32(pico, place, whole, tmp_path):
    train(pico, place, tmp_path / "results", "mask", *NARROW[2:])
    wide = flat(weights(tmp_path / "results", "mask"))
    assert {str(values.dtype) for values in whole.values()} == {"torch.bfloat16"}
    narrow = flat(whole)
    assert float(wide.abs().mean()) > 0.03
    assert float((narrow * wide).sum() / wide.square().sum()) == pytest.approx(1, abs=0.02)
    assert float((narrow - wide).norm() / wide.norm()) < 0.1


def test_a_killed_run_ends_as_the_uninterrupted_one(pico, place, whole, tmp_path):
    step = Trainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(pico, place, tmp_path / "results", "mask", *NARROW)
    train(pico, place, tmp_path / "results", "mask", *NARROW)
    again = weights(tmp_path / "results", "mask")
    assert all(torch.equal(again[name], values) for name, values in whole.items())
