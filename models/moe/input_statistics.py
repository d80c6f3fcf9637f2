"""What a router from data is made of: FFN inputs by objective, summed while a model reads (spec section 9.7.3).

With n_e tokens of objective e, x their inputs to one layer's FFN, and mean_e = sum x / n_e, the scatter within objectives

    sum_e sum_x (x - mean_e)(x - mean_e)^T = sum x x^T - sum_e n_e mean_e mean_e^T

needs one sum of outer products for all objectives together: a pass over the data, and d x d numbers a layer.

Shapes: L layers, E objectives (one per expert), d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.moe.router import discriminant_router


@contextmanager
def recorded_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The last first argument of each module, by its place; no hook is left behind, whatever happens inside."""
    inputs: dict[int, Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda _, arguments, place=place: inputs.__setitem__(place, arguments[0]))
             for place, module in enumerate(modules)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


class InputStatistics:
    """Sums over tokens, in fp64: the scatter is a difference of two large sums that nearly cancel."""

    def __init__(self, layers: int, objectives: int, hidden: int) -> None:
        self.sums = torch.zeros(layers, objectives, hidden, dtype=torch.double)
        self.outer_products = torch.zeros(layers, hidden, hidden, dtype=torch.double)
        self.counts = torch.zeros(objectives, dtype=torch.double)

    def add(self, objective: int, inputs: Sequence[Tensor], mask: Tensor) -> None:
        """Count a batch of one objective.

        Args:
            inputs: each layer's (batch, time, d).
            mask: (batch, time), 1 for tokens that count.
        """
        for layer, batch in enumerate(inputs):
            tokens = batch[mask.bool()].float().cpu()  # (tokens, d)
            self.sums[layer, objective] += tokens.sum(0).double()
            # one batch's product in fp32, which is fast; only the running sum needs the width
            self.outer_products[layer] += (tokens.T @ tokens).double()
        self.counts[objective] += float(mask.sum())

    def means(self) -> Tensor:
        """(L, E, d)."""
        return self.sums / self.counts[None, :, None]

    def within_scatter(self, means: Tensor) -> Tensor:
        """(L, d, d): sum over tokens of (x - mean)(x - mean)^T, by the equation above."""
        return self.outer_products - torch.einsum("led,lef,e->ldf", means, means, self.counts)

    def routers(self, sharpness: float) -> list[Tensor]:
        """Each layer's discriminant router (E, d), fp32."""
        means = self.means()
        scatter, tokens = self.within_scatter(means), self.counts.sum()
        return [discriminant_router(means[layer], scatter[layer] / tokens, sharpness) for layer in range(len(means))]
