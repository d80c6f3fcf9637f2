"""Logits in bfloat16: rounding that is right in the mean, steps that arrive where plain AdamW's do not, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import config
from errors import UserError
from flags import AlignArgs
from models.mask import optimiser
from models.mask.optimiser import RoundedAdamW, round_stochastically
from models.operators.noise import random_bits

SIZE, STEPS = 4096, 200


def trained(kind, dtype, rate, init, beta2=0.999, **options):
    """Logits after STEPS steps of a cosine schedule towards random targets, by noisy gradients as small as a mask's."""
    source = torch.Generator().manual_seed(1)
    target = init + 2 * torch.randn(SIZE, generator=source)
    logits = torch.nn.Parameter(torch.full((SIZE,), init, dtype=dtype))
    adam = kind([logits], lr=rate, betas=(0.9, beta2), **options)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        noise = torch.randn(SIZE, generator=source)
        logits.grad = ((logits.detach().float() - target + noise) * 1e-4).to(dtype)
        adam.step()
    return logits.detach().float()


def test_rounding_is_right_in_the_mean():
    values = torch.tensor([1.001, -1.001, 3e-5, 1e-30, -70000.0, 0.7])
    many = values.repeat(1 << 14)
    rounded = round_stochastically(many.clone(), random_bits("k", 0, many.numel())).view(-1, 6)
    # 16384 draws of at most one of the last places: the mean is off by a 256th of it at four standard deviations at most
    apart = torch.ldexp(torch.ones(6), torch.frexp(values).exponent - 8)
    assert bool(((rounded.float().mean(0) - values).abs() <= apart / 2 * 4 / 128).all())
    assert all(len(rounded[:, i].unique()) == 2 for i in range(6))
    assert bool(((rounded.float() - values).abs() < apart).all())


def test_what_fits_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, 2.0**-130, math.inf, -math.inf, math.nan]).repeat(64)
    rounded = round_stochastically(values.clone(), random_bits("k", 0, values.numel()))
    assert torch.equal(rounded.float().nan_to_num(7.0), values.nan_to_num(7.0))
    assert bool(torch.isnan(rounded.view(64, 8)[:, 7]).all())
    assert bool(torch.isinf(rounded.view(64, 8)[:, 5:7]).all())


@pytest.mark.parametrize(("init", "rate", "tolerance"), [(0.0, 5e-3, 0.05), (0.0, 1e-3, 0.05), (1.0, 5e-3, 0.1),
                                                        (3.0, 5e-3, 0.2)])
def test_steps_arrive(init, rate, tolerance):
    """bfloat16 follows fp32: off by ``tolerance`` of the way, entry by entry, by 1 % of it in the mean."""
    wide, narrow = (trained(kind, dtype, rate, init) - init for kind, dtype in (
        (torch.optim.AdamW, torch.float32), (RoundedAdamW, torch.bfloat16)))
    assert float(wide.abs().mean()) > 50 * rate
    assert float((narrow - wide).norm() / wide.norm()) < tolerance
    assert float((narrow * wide).sum() / wide.square().sum()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("init", "rate"), [(1.0, 1e-3), (3.0, 5e-3)])
def test_rounded_to_the_nearest_they_do_not(init, rate):
    """What --optim of any other name would do: not one of 4096 logits moves in 200 steps, nor with a faster moment."""
    for beta2 in (0.999, 0.95):
        assert bool((trained(torch.optim.AdamW, torch.bfloat16, rate, init, beta2) == init).all())


def test_a_resumed_run_rounds_alike(monkeypatch):
    monkeypatch.setattr(optimiser, "BLOCK", 100)
    source = torch.Generator().manual_seed(2)
    gradients = [torch.randn(250, generator=source).bfloat16() for _ in range(6)]

    def stepped(logits, adam, some):
        for gradient in some:
            logits.grad = gradient
            adam.step()
        return logits

    def begun(values=None, seed=4):
        logits = torch.nn.Parameter(torch.ones(250).bfloat16() if values is None else values)
        return logits, RoundedAdamW([logits], lr=1e-3, weight_decay=0.1, seed=seed)

    whole = stepped(*begun(), gradients)
    logits, adam = begun()
    stepped(logits, adam, gradients[:3])
    again, other = begun(logits.detach().clone())
    other.load_state_dict(adam.state_dict())
    assert torch.equal(stepped(again, other, gradients[3:]), whole)
    assert not torch.equal(stepped(*begun(seed=5), gradients), whole)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float32"):
        RoundedAdamW([torch.nn.Parameter(torch.zeros(2))])


WORDS = ("--method", "mask", "--tasks", "a", "--preset", "own", "--model_name_or_path", "meta-llama/Llama-2-7b-hf",
         "--logit_dtype", "bfloat16")


def problems(*words):
    with pytest.raises(UserError) as refused:
        config.parse(AlignArgs, [*WORDS, *words])
    return refused.value.problems


@pytest.mark.parametrize(("words", "said"), [
    (("--optim", "adamw_8bit"), "--optim adamw_8bit: rounds to the nearest"),
    (("--optim", "sgd"), "allowed: adamw_torch_fused, adamw_torch (AdamW, rounded stochastically), or --logit_dtype"),
    (("--adam_beta2", "0.9999"), "--adam_beta2 0.9999: so slow a moment is more rounding than gradient"),
    (("--mask_init", "-3", "--learning_rate", "1e-4"),
     "--learning_rate 0.0001: bfloat16 has no number within 0.015625 of --mask_init -3"),
])
def test_what_cannot_train_is_refused_at_the_start(words, said):
    (problem,) = problems(*words)
    assert said in problem
    assert "--logit_dtype bfloat16" in problem
    args = config.parse(AlignArgs, [*WORDS[:-2], *words]).args
    assert args.logit_dtype == "float32"


def test_all_of_it_is_said_at_once():
    words = ("--optim", "adafactor", "--adam_beta2", "0.9999", "--mask_init", "3", "--learning_rate", "1e-5")
    assert len(problems(*words)) == 3


@pytest.mark.parametrize("words", [(), ("--optim", "adamw_torch"), ("--mask_init", "3", "--learning_rate", "5e-3"),
                                   ("--adam_beta2", "0.95")])
def test_what_trains_is_taken(words):
    assert config.parse(AlignArgs, [*WORDS, *words]).args.logit_dtype == "bfloat16"
