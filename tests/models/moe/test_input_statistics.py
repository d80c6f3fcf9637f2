"""Sums of FFN inputs while a model reads: means and scatter as of all tokens at once, and hooks that go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.moe.input_statistics import InputStatistics, recorded_inputs
from models.moe.router import discriminant_router

LAYERS, OBJECTIVES, HIDDEN = 2, 3, 5


def read():
    """(statistics of padded batches, the tokens that count: layer -> objective -> (tokens, hidden))."""
    generator = torch.Generator().manual_seed(0)
    statistics = InputStatistics(LAYERS, OBJECTIVES, HIDDEN)
    tokens = [[[] for _ in range(OBJECTIVES)] for _ in range(LAYERS)]
    for objective in range(OBJECTIVES):
        for _ in range(objective + 1):
            mask = (torch.rand(4, 6, generator=generator) > 0.3).long()
            inputs = [torch.randn(4, 6, HIDDEN, generator=generator) + objective for _ in range(LAYERS)]
            statistics.add(objective, inputs, mask)
            for layer, batch in enumerate(inputs):
                tokens[layer][objective].append(batch[mask.bool()].double())
    return statistics, [[torch.cat(batches) for batches in layer] for layer in tokens]


def test_sums_tell_means_and_scatter():
    statistics, tokens = read()
    means = statistics.means()
    assert statistics.counts.tolist() == [len(t) for t in tokens[0]]
    scatter = statistics.within_scatter(means)
    for layer in range(LAYERS):
        want = torch.stack([t.mean(0) for t in tokens[layer]])
        torch.testing.assert_close(means[layer], want, rtol=1e-6, atol=1e-6)
        centred = torch.cat([t - t.mean(0) for t in tokens[layer]])
        torch.testing.assert_close(scatter[layer], centred.T @ centred, rtol=1e-5, atol=1e-4)


def test_routers_are_the_discriminants_of_each_layer():
    statistics, _ = read()
    means, scatter = statistics.means(), statistics.within_scatter(statistics.means())
    routers = statistics.routers(1.5)
    assert len(routers) == LAYERS
    for layer, router in enumerate(routers):
        assert torch.equal(router, discriminant_router(means[layer], scatter[layer] / statistics.counts.sum(), 1.5))


def test_hooks_go_also_when_reading_fails():
    modules = [nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS)]
    x = torch.ones(2, HIDDEN)
    seen = {}

    def read_and_fail():
        with recorded_inputs(modules) as inputs:
            modules[1](x)
            seen.update(inputs)
            modules[0](x[:, 1:])

    with pytest.raises(RuntimeError, match="shapes"):
        read_and_fail()
    assert sorted(seen) == [1]
    assert seen[1] is x
    assert not any(module._forward_pre_hooks for module in modules)
