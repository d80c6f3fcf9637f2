"""Counted noise: every number is a function of a key and its own index alone.

Whoever walks a tensor in blocks, on many workers, or a second time in the backward pass meets the same numbers again, and
nothing has to be stored. Both streams are Philox4x64-10 (Salmon et al. 2011), whose counter is the index; they differ in
how many bits a number takes, and results that were published with one of them depend on its bits.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

#: One step of numpy's Philox counter gives four 64-bit words: eight draws of 32 bits, or sixteen of 16 bits.
_DRAWS_32, _DRAWS_16 = 8, 16
_WORDS = 4


def _key(text: str) -> int:
    """Philox' 128-bit key; hashed, so that keys that differ in one character give independent streams."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def device_seed(key: str) -> int:
    """A key's seed of 63 bits, which is what torch's and Triton's generators take."""
    return _key(key) & (2**63 - 1)


def uniform(seed: int, name: str, which: int, first: int, count: int) -> Tensor:
    """Draws from U[0, 1) for elements first .. first + count of a tensor, (count,) fp32, multiples of 2**-24.

    Args:
        name: of the tensor.
        which: of the inputs: each has draws of its own.
    """
    # a counter step cannot be entered half way: start at the step that holds ``first`` and skip what lies before it
    skip = first % _DRAWS_32
    philox = np.random.Philox(key=_key(f"{seed}|{which}|{name}"), counter=first // _DRAWS_32)
    return torch.from_numpy(np.random.Generator(philox).random(skip + count, dtype=np.float32)[skip:])


def random_bits(key: str, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """16 random bits for each of the elements first .. first + count, (count,) int16: a function of (key, index) alone.

    They stand for u = (bits + 32768.5) / 65536 (``midpoints``), which is never 0 or 1 and symmetric: ``~bits`` is 1 - u. On
    a GPU they are the device's own Philox, another stream, that starts at 0 only.

    Raises:
        ValueError: a GPU's stream is asked for from the middle.
    """
    if torch.device(device).type != "cpu":
        if first:
            raise ValueError("a device's stream is drawn from its start")
        # drawing on the CPU instead would send two bytes a weight over the bus
        generator = torch.Generator(device).manual_seed(device_seed(key))
        return torch.empty(count, dtype=torch.int16, device=device).random_(-(1 << 15), 1 << 15, generator=generator)
    skip = first % _DRAWS_16
    word_count = -(-(skip + count) // _WORDS)  # four 16-bit draws to a word, rounded up
    words = np.random.Philox(key=_key(key), counter=first // _DRAWS_16).random_raw(word_count)
    return torch.from_numpy(words.view(np.int16)[skip:skip + count])


def midpoints(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers in (0, 1) that ``random_bits`` stand for: the middles of 65536 equal steps, exact in fp32."""
    return bits.to(dtype).add_(32768.5).div_(65536)
