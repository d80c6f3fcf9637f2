"""The fused layer for answering: the same function as ``SharedMoe`` in two large products and what lies between them.

Made when a run is loaded and never saved. With W the shared base and A, B the experts' factors, its two matrices are

    [W_gate; W_up; A^gate_1 .. A^gate_E; A^up_1 .. A^up_E]     one product gives all that a token's experts start from
    [W_down, B_1 .. B_E]                                       y = W_down m + sum_e B_e s_e, with (m, s) side by side

for m = sum_e w_e h_e and s_e = w_e A_e h_e. The base's own matrices are taken apart as theirs are made, layer by layer, so
that no weight is there twice. A quantised base is no plain matrix and keeps its own products.

A token's k experts are computed as k rows, not all E: z of every expert but the row's own is set to 0, so that one product
with [B_1 .. B_E] adds the right expert's change, whichever it is, and nothing has to be sorted or gathered.

Shapes: N tokens, E experts, k of them chosen, d hidden size, f intermediate size, r rank of gate and up, q of down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.moe.expert_sum import ExpertInputs, SumOptions
from models.moe.kernel_sum import Call, serves
from models.moe.layer import PROJECTIONS, SharedMoe
from models.moe.router import route

#: Rows times f that are worked on together: both bfloat16 tensors of a block stay in the caches of two cores.
_BLOCK = 2**20


class PackedMoe(nn.Module):
    """A ``SharedMoe`` that answers and no longer trains; takes the matrices out of the layer that it is made from.

    Its ``router``, ``top_k``, ``num_experts``, ``record`` and ``probabilities`` are those of ``SharedMoe``.

    Args:
        moe: folded (``ExpertFactors.fold_``), so that its factors are in the compute dtype. Of no use afterwards.
    """

    def __init__(self, moe: SharedMoe) -> None:
        super().__init__()
        self.act_fn, self.router, self.top_k = moe.act_fn, moe.router, moe.top_k
        self.record = False
        self.probabilities: Tensor | None = None
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = ((moe.experts[n].a, moe.experts[n].b) for n in PROJECTIONS)
        experts, self.rank, _ = gate_a.shape
        self.width = gate_b.shape[1]
        shrink = torch.cat([gate_a.flatten(0, 1), up_a.flatten(0, 1)])  # (2 E r, d)
        # (E r, f) and (f, E q): as the products read them
        self.register_buffer("expand_gate", gate_b.mT.flatten(0, 1).contiguous())
        self.register_buffer("expand_up", up_b.mT.flatten(0, 1).contiguous())
        self.register_buffer("shrink_down", down_a.flatten(0, 1).contiguous())  # (E q, f)
        spread = down_b.permute(1, 0, 2).flatten(1)  # (d, E q)
        self.quantised = not all(type(p) is nn.Linear for p in (moe.gate_proj, moe.up_proj, moe.down_proj))
        if self.quantised:
            self.gate_proj, self.up_proj, self.down_proj = moe.gate_proj, moe.up_proj, moe.down_proj
            self.register_buffer("enter", shrink)
            self.register_buffer("leave", spread.contiguous())
        else:
            biases = [p.bias for p in (moe.gate_proj, moe.up_proj)]
            self.register_buffer("enter_bias", None if biases[0] is None else torch.cat(
                [*biases, shrink.new_zeros(len(shrink))]).detach())
            self.register_buffer("leave_bias", None if moe.down_proj.bias is None else moe.down_proj.bias.detach())
            self.register_buffer("enter", torch.cat([moe.gate_proj.weight, moe.up_proj.weight, shrink]).detach())
            # before the next matrix is made: what was copied is let go
            del moe.gate_proj, moe.up_proj
            self.register_buffer("leave", torch.cat([moe.down_proj.weight, spread], 1).detach())
            del moe.down_proj
        self.num_experts = experts

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        x = hidden.reshape(-1, hidden.shape[-1])
        # fp32, by the rule of training: rounding would change which experts a token goes to
        probabilities, weights, chosen = route(F.linear(x.float(), self.router), self.top_k)
        if self.record:
            self.probabilities = probabilities.view(*hidden.shape[:-1], -1)
        gate, up, shrunk = self._enter(x)
        shrunk = shrunk.view(len(x), 2, self.num_experts, self.rank)
        together = gate.new_empty(len(x), self.width + len(self.shrink_down))
        # by the GPU's kernel where it serves, else in blocks of tokens that stay in cache
        inputs = ExpertInputs(gate, up, shrunk, weights, self.expand_gate.view(self.num_experts, self.rank, -1).mT,
                              self.expand_up.view(self.num_experts, self.rank, -1).mT,
                              self.shrink_down.view(self.num_experts, -1, self.width))
        if serves(inputs, self.act_fn):
            rows = self.expand_gate, self.expand_up, self.shrink_down
            call = Call(inputs, chosen, SumOptions(self.act_fn), rows)
            together[:, self.width :] = call.forward(together[:, : self.width])
        else:
            block = max(1, _BLOCK // (self.width * self.top_k))
            for start in range(0, len(x), block):
                part = slice(start, start + block)
                _mix_block(self, together[part], gate[part], up[part], shrunk[part], weights[part], chosen[part])
        return self._leave(together).view_as(hidden)

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, d) -> gate and up of the base (N, f), and A x of all experts (N, 2 E r): views of one product."""
        if self.quantised:
            return self.gate_proj(x), self.up_proj(x), F.linear(x, self.enter)
        made = F.linear(x, self.enter, self.enter_bias)
        return made[:, : self.width], made[:, self.width : 2 * self.width], made[:, 2 * self.width :]

    def _leave(self, together: Tensor) -> Tensor:
        """m and s side by side (N, f + E q) -> (N, d)."""
        if self.quantised:
            return self.down_proj(together[:, : self.width]) + F.linear(together[:, self.width :], self.leave)
        return F.linear(together, self.leave, self.leave_bias)


def _mix_block(moe: PackedMoe, made: Tensor, gate: Tensor, up: Tensor, shrunk: Tensor, weights: Tensor,
               chosen: Tensor) -> None:
    """Fill m and s side by side, (n, f + E q), slot by slot: what its tokens put first, second, ...

    Args:
        gate, up: (n, f), the base's; overwritten.
        shrunk: (n, 2, E, r), A x.
        weights, chosen: (n, k), the router's.
    """
    total, small = made[:, : moe.width], made[:, moe.width :].unflatten(1, (moe.num_experts, -1))
    last, shares = chosen.shape[1] - 1, weights.to(made.dtype)
    first = total  # until the first slot has made its own, where a later one reads it
    for slot in range(last + 1):
        own = torch.zeros_like(shrunk[:, 0, :, 0]).scatter_(1, chosen[:, slot, None], 1.0)  # (n, E)
        own_gate, own_up = (shrunk * own[:, None, :, None]).flatten(2).unbind(1)  # (n, E r)
        # the last slot may have the base's own tensors: nobody reads them again
        add = torch.Tensor.addmm_ if slot == last else torch.addmm
        hidden = moe.act_fn(add(gate, own_gate, moe.expand_gate))
        hidden *= add(up, own_up, moe.expand_up)
        part = F.linear(hidden, moe.shrink_down).view(len(own), moe.num_experts, -1)  # (n, E, q)
        part = part * (own * shares[:, slot, None])[..., None]
        small.copy_(part) if slot == 0 else small.add_(part)
        if last == 0:
            total.copy_(hidden)
        elif last == 1 and slot == 1:
            # two weights that sum to 1, h_0 + w_1 (h_1 - h_0): computed in fp32, rounded once, in one pass over memory
            torch.lerp(first, hidden, shares[:, 1:], out=total)
        elif slot == 0:
            first = hidden if last == 1 else hidden.to(_wide(hidden)).mul_(weights[:, :1])
        else:
            first.addcmul_(hidden.to(first.dtype), weights[:, slot, None].to(first.dtype))
    if last > 1:
        total.copy_(first)


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def pack(model: nn.Module) -> nn.Module:
    """Every folded ``SharedMoe`` of a model replaced by its ``PackedMoe``, in place, one at a time; returns the model."""
    # names, not layers: a list of layers would hold the old matrices until the last new one is made
    places = [(parent, name) for parent in model.modules() for name, child in parent.named_children()
              if isinstance(child, SharedMoe)]
    for parent, name in places:
        setattr(parent, name, PackedMoe(getattr(parent, name)))
    return model
