"""``top:`` read-outs: what a sort of all logits gives, ties included, in memory that the number of logits does not move."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from models.mask import readout
from models.mask.readout import read_out
from models.mask.settings import Settings, parse_readout


def plainly(logits, share):
    """The same by one stable sort of everything: larger first, of equal ones the earlier."""
    flat = torch.cat([value.float().reshape(-1) for value in logits.values()])
    order = torch.sort(flat, descending=True, stable=True).indices
    kept = torch.zeros(len(flat))
    kept[order[:max(1, round(share * len(flat)))]] = 1
    pieces = kept.split([value.numel() for value in logits.values()])
    return {name: piece.view(value.shape) for (name, value), piece in zip(logits.items(), pieces, strict=True)}


def made(kind):
    source = torch.Generator().manual_seed(3)
    sizes = {"a": 700, "none": 0, "b": 1301, "c": 64}
    values = {name: torch.randn(size, generator=source) for name, size in sizes.items()}
    if kind == "ties":
        return {name: (value * 2).round() / 2 for name, value in values.items()}
    if kind == "zeros":
        return {name: torch.where(value > 0, 0.0, -0.0) for name, value in values.items()}
    if kind == "far":
        return {name: value.sign() * 10 ** (value * 12) for name, value in values.items()}
    return {name: value.bfloat16() for name, value in values.items()} if kind == "bfloat16" else values


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "far", "bfloat16"])
@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.503, 1.0])
def test_it_is_what_a_sort_gives(kind, share, monkeypatch):
    monkeypatch.setattr(readout, "BLOCK", 256)  # several blocks a tensor: ties end within one
    logits = made(kind)
    found, want = dict(read_out(logits, Settings(), parse_readout(f"top:{share}"))), plainly(logits, share)
    assert list(found) == list(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert sum(int(mask.sum()) for mask in found.values()) == max(1, round(share * 2065))


def taken(tensors, size=1 << 18):
    """(bytes that torch's allocator gave out at most while the masks passed by, bytes of the logits)."""
    source = torch.Generator().manual_seed(5)
    logits = {str(i): torch.randn(size, generator=source).bfloat16() for i in range(tensors)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = sum(int(mask.sum()) for _, mask in read_out(logits, Settings(), parse_readout("top:0.5")))
    assert kept == tensors * size // 2
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, tensors * size * 2


def test_memory_does_not_grow_with_the_logits(monkeypatch):
    monkeypatch.setattr(readout, "BLOCK", 1 << 14)
    (few, _), (many, held) = taken(2), taken(12)
    assert many < held  # less than one copy of the logits in their own two bytes, let alone of all in fp32
    assert many == pytest.approx(few, rel=0.02)
