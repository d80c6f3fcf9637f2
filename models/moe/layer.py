"""One FFN, many low-rank experts, a top-k router: the layer of the fused MoE.

Every expert is the base FFN plus a rank-r change of its three matrices, W_e = W + B_e A_e. So the base products W x are
computed once, each expert adds B_e (A_e x), and for the down projection with router weights w_e

    sum_e w_e (W + B_e A_e) h_e = W (sum_e w_e h_e) + sum_e B_e (A_e w_e h_e).

One dense FFN instead of k, one set of weights instead of E, the same function (spec section 9.7.1).

Shapes: N tokens, E experts, d hidden size, f intermediate size, r rank, R rank with the tuned rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.moe.expert_sum import ExpertInputs, SumOptions, expert_sum
from models.moe.kernel_sum import kernel_sum, serves
from models.moe.router import low_rank_norm, route

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class TuningConfig:
    """Second-stage LoRA on every expert: W_e = W + B_e A_e + (alpha / r) B'_e A'_e, B' starting at zero.

    Args:
        r, alpha, dropout: as in PEFT; dropout is a share in [0, 1) of A' inputs.
    """

    r: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.r


def halves(linear: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """A frozen layer (2 f, d) as two (f, d), upper rows first: views of its weight, and of its bias where it has one."""
    parts = []
    # on no device: their weights are put in next
    with torch.device("meta"):
        upper, lower = (nn.Linear(linear.in_features, linear.out_features // 2, linear.bias is not None) for _ in range(2))
    for part, rows in zip((upper, lower), (slice(None, upper.out_features), slice(upper.out_features, None)), strict=True):
        for name in ("weight", "bias"):
            if (whole := getattr(linear, name)) is not None:
                setattr(part, name, nn.Parameter(whole.data[rows], requires_grad=False))
        parts.append(part)
    return parts[0], parts[1]


class ExpertFactors(nn.Module):
    """The low-rank changes of one projection for all experts.

    Args:
        a: (E, r, in), aligned factors, frozen.
        b: (E, out, r), aligned factors with the LoRA scale already applied, frozen.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        # buffers: they move with the model and no optimiser finds them
        self.register_buffer("a", a.contiguous())
        self.register_buffer("b", b.contiguous())
        self.tuned_a: nn.Parameter | None = None
        self.tuned_b: nn.Parameter | None = None
        self.scale = 0.0

    def add_tuning(self, tuning: TuningConfig, generator: torch.Generator) -> None:
        """Add trainable A' (E, r', in), Kaiming-uniform as PEFT draws it, and B' (E, out, r'), zero: the same function."""
        experts, _, inputs = self.a.shape
        # kaiming_uniform_ with a = sqrt(5): gain^2 = 1/3, and the bound is sqrt(3 gain^2 / in)
        bound = inputs**-0.5
        # drawn on the CPU, so that a seed means the same start on every device
        start = torch.rand(experts, tuning.r, inputs, generator=generator) * (2 * bound) - bound
        self.tuned_a = nn.Parameter(start.to(self.a.device))
        self.tuned_b = nn.Parameter(torch.zeros(experts, self.b.shape[1], tuning.r, device=self.b.device))
        self.scale = tuning.scale

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Effective factors, aligned rows first: (E, R, in) and (E, out, R), in the compute dtype."""
        if self.tuned_a is None or self.tuned_b is None:
            return self.a.to(dtype), self.b.to(dtype)
        a = torch.cat([self.a.to(dtype), self.tuned_a.to(dtype)], 1)
        # scaled in fp32 before the cast: bfloat16 then rounds the product once
        b = torch.cat([self.b.to(dtype), (self.tuned_b * self.scale).to(dtype)], 2)
        return a, b

    def change_norms(self) -> Tensor:
        """||(alpha/r) B'_e A'_e||_F of each expert, (E,): the exact distance from the aligned weights (spec section 5.4)."""
        if self.tuned_a is None or self.tuned_b is None:
            return self.a.new_zeros(len(self.a), dtype=torch.float32)
        return self.scale * low_rank_norm(self.tuned_a, self.tuned_b)

    def fold_(self, dtype: torch.dtype) -> None:
        """Make the tuned factors part of the fixed ones, in the compute dtype: answers need no casts and joins a token."""
        self.a, self.b = (t.detach().contiguous() for t in self.factors(dtype))
        self.tuned_a = self.tuned_b = None

    def delta(self, expert: int) -> Tensor:
        """(out, in): the expert's whole change of the base matrix, materialised in fp32."""
        a, b = self.factors(torch.float32)
        return b[expert] @ a[expert]


class SharedMoe(nn.Module):
    """A drop-in replacement of a gated FFN.

    Args:
        gate, up, down: the base projections; frozen and shared.
        activation: the FFN's non-linearity.
        factors: projection -> aligned (a (E, r, in), b (E, out, r)).
        router: (E, d) start values.
        top_k: experts per token.

    The last forward's router probabilities (..., E) stay in ``probabilities`` while ``record`` is on, so that
    losses and statistics need no hooks.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, activation: nn.Module,
                 factors: dict[str, tuple[Tensor, Tensor]], router: Tensor, top_k: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, activation
        self.experts = nn.ModuleDict({name: ExpertFactors(*factors[name]) for name in PROJECTIONS})
        self.router = nn.Parameter(router.float())
        self.top_k = top_k
        self.dropout = 0.0
        self.record = False
        self.probabilities: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return len(self.router)

    def add_tuning(self, tuning: TuningConfig, generator: torch.Generator) -> None:
        for name in PROJECTIONS:
            self.experts[name].add_tuning(tuning, generator)
        self.dropout = tuning.dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        x = hidden.reshape(-1, hidden.shape[-1])  # (N, d)
        # the router is small and decides discretely: always fp32, also under autocast
        with torch.autocast(x.device.type, enabled=False):
            probabilities, weights, chosen = route(F.linear(x.float(), self.router), self.top_k)
        if self.record:
            self.probabilities = probabilities.view(*hidden.shape[:-1], -1)
        gate, up = self.gate_proj(x), self.up_proj(x)  # (N, f)
        if torch.is_autocast_enabled(x.device.type):
            # a layer in 4 or 8 bits answers in the dtype of its input, which autocast does not reach
            gate, up = (product.to(torch.get_autocast_dtype(x.device.type)) for product in (gate, up))
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (self.experts[n].factors(gate.dtype) for n in PROJECTIONS)
        # one product for the A of every expert and both projections: x, the largest operand, is read once
        shrunk_inputs = self._shrink(x, torch.cat([gate_a, up_a]), self.experts["gate"].a.shape[1])
        shrunk_inputs = shrunk_inputs.view(len(x), 2, self.num_experts, -1)  # (N, 2, E, R)
        with torch.autocast(x.device.type, enabled=False):
            dropped = F.dropout(torch.ones_like(gate), self.dropout) if self.training and self.dropout else None
            mixed, shrunk_hidden = self._sum(ExpertInputs(gate, up, shrunk_inputs, weights, gate_b, up_b, down_a), chosen,
                                             dropped)
        # sum_e B_e shrunk_e as one product: (N, E R) with B of all experts side by side, (d, E R)
        low_rank = F.linear(shrunk_hidden.flatten(1), down_b.permute(1, 0, 2).flatten(1))
        return (self.down_proj(mixed) + low_rank).view_as(hidden)

    def _sum(self, inputs: ExpertInputs, chosen: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """The experts' weighted sum, by the GPU's kernels where they serve; ``inputs.weights`` are those of the chosen."""
        aligned, aligned_down = self.experts["gate"].a.shape[1], self.experts["down"].a.shape[1]
        options = SumOptions(self.act_fn, dropped, aligned_down, aligned, aligned_down)
        return (kernel_sum if serves(inputs, self.act_fn) else expert_sum)(inputs, chosen, options)

    def _shrink(self, x: Tensor, stacked_a: Tensor, aligned_rank: int) -> Tensor:
        """A x of m matrices: (N, d), (m, R, d) -> (N, m R). Dropout, PEFT's rule, reaches the tuned rows only."""
        shrunk = F.linear(x, stacked_a.flatten(0, 1))
        if not (self.training and self.dropout) or stacked_a.shape[1] == aligned_rank:
            return shrunk
        tuned = F.linear(F.dropout(x, self.dropout), stacked_a[:, aligned_rank:].flatten(0, 1))
        shrunk = shrunk.view(len(x), len(stacked_a), -1)  # (N, m, R)
        return torch.cat([shrunk[..., :aligned_rank], tuned.view(len(x), len(stacked_a), -1)], -1).flatten(1)

    def materialise(self, expert: int) -> dict[str, Tensor]:
        """The dense fp32 matrices of one expert, for tests and export: name -> W + B_e A_e."""
        bases = {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}
        return {name: bases[name].weight.float() + self.experts[name].delta(expert) for name in PROJECTIONS}
