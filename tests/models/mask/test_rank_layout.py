"""Where rank components lie, and that the fused B times the common A is the sum of the changes it stands for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.mask.blocks import blocks, piece, spread
from models.mask.settings import Rule, Settings
from models.mask.slots import components, down_factor, plan, tensors_of
from models.mask.units import RankLayout, Units, units_of

MODULE, OUT, IN = "model.layers.0.mlp.up_proj", 9, 7


def model(rank: int | None, seed: int):
    """A model of which nothing but its factors of one module is asked; rank None: no adapter."""
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(rank or 1, IN, generator=generator), torch.randn(OUT, rank or 1, generator=generator))
    adapter = None if rank is None else SimpleNamespace(modules={MODULE: pair}, config={})
    return SimpleNamespace(name=f"m{seed}", adapter=adapter, checkpoint=SimpleNamespace(config={}, folder=Path("base")))


def change(of):
    if of.adapter is None:
        return torch.zeros(OUT, IN)
    a, b = of.adapter.modules[MODULE]
    return b @ a


@pytest.mark.parametrize("aligned_rank", [0, 2])
def test_columns_partition_the_width(aligned_rank):
    layout = RankLayout(aligned_rank, components=3, tasks=4)
    columns = list(range(layout.width))
    assert layout.width == aligned_rank + 12
    parts = [columns[layout.aligned_columns], *(columns[layout.columns_of_task(task)] for task in range(4))]
    assert [c for part in parts for c in part] == columns
    index = layout.units(out=5).index
    assert all(index[column] == -1 for column in parts[0])
    assert all([index[column] for column in part] == [0, 1, 2] for part in parts[1:])
    assert layout.units(out=5).shape == (5, layout.width)
    assert layout.units(out=5).size == 3


@pytest.mark.parametrize(("aligned_rank", "ranks"), [(None, (2, 4)), (2, (2, 2)), (3, (1, 6)), (None, (20, 1))])
def test_fused_factors_are_the_sum_of_the_changes(aligned_rank, ranks):
    aligned, tasks = model(aligned_rank, 0), [model(rank, i + 1) for i, rank in enumerate(ranks)]
    (spec,) = plan(Settings(space="factors", granularity="rank", rule=Rule("task_arithmetic", 0.3)), aligned, tasks)
    parts = components(MODULE, aligned, tasks)
    base, deltas = tensors_of(spec, aligned, tasks, parts)
    down = down_factor(spec, aligned, parts)
    assert base.shape == spec.shape == (OUT, len(down))
    assert spec.units.size == parts[0][0].shape[0] == min(max(ranks) + (aligned_rank or 0), OUT, IN)
    torch.testing.assert_close(base @ down, change(aligned), rtol=1e-4, atol=1e-4)
    for task, delta in zip(tasks, deltas, strict=True):
        torch.testing.assert_close(delta @ down, change(task) - change(aligned), rtol=1e-4, atol=1e-4)
    for a, b in parts:
        sizes = a.norm(dim=1) * b.norm(dim=0)
        assert (sizes[:-1] >= sizes[1:] - 1e-5).all()


@pytest.mark.parametrize("units", [units_of("w", (6, 10), kind, 4, {}) for kind in ("element", "row", "block", "layer")]
                         + [RankLayout(1, 3, 3).units(6)], ids=["element", "row", "block", "layer", "rank"])
def test_blocks_see_the_mask_of_their_entries(units: Units):
    mask = torch.arange(1.0, units.size + 1)
    whole = units.expand(mask).expand(units.matrix).reshape(-1)
    for first in range(0, 60, 7):
        block = slice(first, min(first + 13, 60))
        cut = spread(units, mask, block, mask.device)
        assert torch.equal(cut.expand(block.stop - block.start), whole[block])
    assert spread(units, None, slice(0, 9), mask.device).tolist() == [1.0]


def test_blocks_cover_a_tensor_once(monkeypatch):
    monkeypatch.setattr("models.mask.blocks.BLOCK", 8)
    values = torch.arange(30.0).view(5, 6)
    assert [b.stop - b.start for b in blocks(values)] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([piece(values, block) for block in blocks(values)]), values.reshape(-1))
    assert list(blocks(torch.zeros(0))) == []
