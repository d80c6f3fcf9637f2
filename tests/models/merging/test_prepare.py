"""TIES over the whole model: the three passes that find what every tensor keeps, against one sort over all of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models.merging.prepare import ties_over_the_model
from models.operators import spans
from models.operators.blocks import MemoryBlocks
from models.operators.parameters import Ties
from models.operators.selection import EVERYTHING, NOTHING, count

SHAPES = {"b": (20, 30), "a": (7,), "c": (0, 4), "d": (200,)}


@pytest.fixture(params=[1 << 18, 64])
def block_size(request, monkeypatch):
    monkeypatch.setattr(spans, "BLOCK", request.param)


def model(inputs, density, scope="model"):
    """Jobs in the order of SHAPES and their task vectors, of few magnitudes: ties everywhere."""
    generator = torch.Generator().manual_seed(0)
    deltas = {name: [(2 * torch.randn(shape, generator=generator)).round() / 2 for _ in range(inputs)]
              for name, shape in SHAPES.items()}
    parameters = Ties(weight=(1.0,) * inputs, density=density, scope=scope)
    jobs = tuple(SimpleNamespace(name=name, shape=shape, copied=False, parameters=parameters)
                 for name, shape in SHAPES.items())
    walks = []

    def walk(function):
        walks.append(function)
        return {job.name: function(MemoryBlocks(torch.zeros(job.shape), deltas[job.name])) for job in jobs}

    return jobs, deltas, walk, walks


def kept_by_sorting(deltas, which, density):
    """Tensor -> mask of the k largest of one input over all tensors; ties by name, then by index."""
    entries = [(-abs(float(x)), name, i) for name in deltas for i, x in enumerate(deltas[name][which].flatten())]
    masks = {name: torch.zeros(deltas[name][which].numel(), dtype=torch.bool) for name in deltas}
    for _, name, i in sorted(entries)[:count(density, len(entries))]:
        masks[name][i] = True
    return masks


def test_every_tensor_keeps_its_share_of_the_model_s_largest(block_size):
    density = (0.3, 0.05, 0.77)
    jobs, deltas, walk, walks = model(3, density)
    cuts = ties_over_the_model(jobs, walk)
    assert len(walks) == 3
    for which, share in enumerate(density):
        want = kept_by_sorting(deltas, which, share)
        for name in SHAPES:
            assert torch.equal(cuts[name][which].fresh().mask(deltas[name][which]).flatten(), want[name])


def test_inputs_that_keep_all_or_nothing_cost_no_pass():
    jobs, deltas, walk, walks = model(2, (1.0, 0.0))
    cuts = ties_over_the_model(jobs, walk)
    assert not walks
    assert all(row == [EVERYTHING, NOTHING] for row in cuts.values())
    jobs, deltas, walk, walks = model(2, (1.0, 0.4))
    cuts = ties_over_the_model(jobs, walk)
    assert len(walks) == 3
    kept = sum(int(cuts[name][1].fresh().mask(deltas[name][1]).sum()) for name in SHAPES)
    assert kept == count(0.4, 807)
    assert all(row[0] == EVERYTHING for row in cuts.values())


def test_tensor_by_tensor_needs_no_preparation():
    jobs, _, walk, walks = model(1, (0.3,), scope="tensor")
    assert ties_over_the_model(jobs, walk) == {}
    assert ties_over_the_model((), walk) == {}
    assert not walks
