"""Counted noise: a function of key and index alone, with the bits that published results were made with."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from models.mask import concrete
from models.operators.noise import midpoints, random_bits, uniform


def key(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


@pytest.mark.parametrize("first", [0, 1, 7, 8, 15, 16, 137])
def test_any_stretch_is_part_of_the_whole(first):
    assert torch.equal(uniform(1, "a", 0, first, 400), uniform(1, "a", 0, 0, 1000)[first:first + 400])
    assert torch.equal(random_bits("a", first, 400), random_bits("a", 0, 1000)[first:first + 400])


def test_the_streams_are_numpys_philox():
    draws = np.random.Generator(np.random.Philox(key=key("3|1|layer"))).random(100, dtype=np.float32)
    assert uniform(3, "layer", 1, 0, 100).tolist() == draws.tolist()
    words = np.random.Philox(key=key("s|0")).random_raw(25)
    # four numbers to a word, the lowest bits first, whatever the machine's order
    wanted = [(int(word) >> shift & 0xFFFF) - (1 << 16) * (int(word) >> shift + 15 & 1) for word in words
              for shift in (0, 16, 32, 48)]
    assert random_bits("s|0", 0, 100).tolist() == wanted


def test_every_part_of_the_key_counts():
    first = uniform(1, "a", 0, 0, 1000)
    for other in (uniform(2, "a", 0, 0, 1000), uniform(1, "b", 0, 0, 1000), uniform(1, "a", 1, 0, 1000)):
        assert float((first - other).abs().mean()) > 0.2


def test_midpoints_are_symmetric_and_never_at_the_ends():
    bits = torch.tensor([-32768, -1, 0, 32767], dtype=torch.int16)
    assert midpoints(bits).tolist() == [0.5 / 65536, 32767.5 / 65536, 32768.5 / 65536, 65535.5 / 65536]
    assert torch.equal(midpoints(~bits), 1 - midpoints(bits))
    assert midpoints(bits, torch.float64).dtype == torch.float64


def test_draws_lie_below_one_and_evenly():
    draws = uniform(0, "t", 0, 0, 100_000)
    assert draws.dtype == torch.float32
    assert 0 <= float(draws.min()) <= float(draws.max()) < 1
    counts = torch.histc(draws, 10, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 30  # chi-square with 9 degrees: p = 0.0004


def test_no_draws_are_no_draws():
    assert uniform(0, "t", 0, 5, 0).numel() == 0
    assert random_bits("t", 5, 0).numel() == 0


def test_the_mask_draws_from_here():
    assert concrete.noise is random_bits
    assert concrete.uniform is midpoints
