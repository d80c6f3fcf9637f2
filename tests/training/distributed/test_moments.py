"""Moments shared out among processes: who has which, and that each steps its own alone."""

from __future__ import annotations

import torch

from training.distributed import moments
from training.distributed.moments import owners, share_out


def test_all_have_about_as_much():
    sizes = [7, 100, 40, 40, 1, 60, 7]
    found = owners(sizes, 3)
    held = [sum(size for size, owner in zip(sizes, found, strict=True) if owner == rank) for rank in range(3)]
    assert max(held) - min(held) <= 40
    assert sum(held) == sum(sizes)
    assert owners(sizes, 3) == found
    assert owners([5, 5, 5, 5], 2) == [0, 1, 0, 1]


def test_each_steps_its_own_and_sends_it_round(monkeypatch):
    """Two processes in one, a step each: what is sent becomes the other's."""
    sent = []

    class Done:
        def wait(self):
            sent[-1][1] = True

    def broadcast(tensor, owner, async_op):
        sent.append([owner, False, tensor.clone()])
        return Done()

    monkeypatch.setattr(moments.dist, "broadcast", broadcast)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (3, 8, 4)]
    adam = torch.optim.AdamW(parameters, lr=0.1)
    assert share_out(adam, 1, 2) == {0, 2}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert [len(adam.state[p]) > 0 for p in parameters] == [True, False, True]
    assert [owner for owner, *_ in sent] == [1, 0, 1]
    assert [bool((value < 1).all()) for *_, value in sent] == [True, False, True]
    assert parameters[1].grad is None
