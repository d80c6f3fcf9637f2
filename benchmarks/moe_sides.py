"""The sides of the MoE's race, and how they are timed: ours, one dense FFN, transformers' experts, the published loop."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from models.moe.layer import SharedMoe, TuningConfig
from models.moe.router import route

#: (N, d) -> (N, d).
Side = Callable[[Tensor], Tensor]
BACKENDS = ("eager", "grouped_mm", "batched_mm")
#: A sample is as many calls as take about this long.
SAMPLE_SECONDS = 0.05


def make(hidden: int, width: int, experts: int, top_k: int, rank: int, dtype: torch.dtype, device: str,
         tuned: bool) -> SharedMoe:
    """A ``SharedMoe`` with random weights of the size that training leaves; folded, if it is not tuned."""
    torch.manual_seed(0)
    with torch.device(device):
        parts = [nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((hidden, width), (hidden, width), (width, hidden))]
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, part in zip(("gate", "up", "down"), parts, strict=True):
        part.weight.requires_grad_(False)
        out, inner = part.weight.shape
        factors[name] = (torch.randn(experts, rank, inner, generator=generator) * inner**-0.5,
                         torch.randn(experts, out, rank, generator=generator) * 0.02)
    router = torch.randn(experts, hidden, generator=generator) * hidden**-0.5
    moe = SharedMoe(*parts, nn.SiLU(), factors, router, top_k).to(device)
    if tuned:
        moe.add_tuning(TuningConfig(rank, rank), generator)
        return moe
    for factors_of in moe.experts.values():
        factors_of.fold_(dtype)
    return moe.eval()


def dense_ffn(moe: SharedMoe, rank: int = 0) -> tuple[Side, list[Tensor]]:
    """The base FFN of a layer as a function, with a LoRA of a rank on each matrix; and the LoRA's parameters."""
    loras = {}
    for name in ("gate_proj", "up_proj", "down_proj") if rank else ():
        out, inner = getattr(moe, name).weight.shape
        device = moe.router.device
        loras[name] = [torch.randn(rank, inner, device=device).mul_(inner**-0.5).requires_grad_(),
                       torch.zeros(out, rank, device=device).requires_grad_()]

    def product(name: str, x: Tensor) -> Tensor:
        y = getattr(moe, name)(x)
        if name in loras:
            a, b = loras[name]
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return y

    return (lambda x: product("down_proj", F.silu(product("gate_proj", x)) * product("up_proj", x)),
            [p for pair in loras.values() for p in pair])


def mixtral(moe: SharedMoe) -> dict[str, nn.Module]:
    """Back end -> a Mixtral block with that layer's materialised experts; the blocks share their weights."""
    (width, hidden), dtype = moe.gate_proj.weight.shape, moe.gate_proj.weight.dtype
    dense = [moe.materialise(e) for e in range(moe.num_experts)]
    gate_up = torch.stack([torch.cat([w["gate"], w["up"]]) for w in dense]).to(dtype)
    down = torch.stack([w["down"] for w in dense]).to(dtype)
    blocks = {}
    for backend in BACKENDS:
        # one configuration for each: a shared one would make all of them run the back end that was set last
        config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=moe.num_experts,
                               num_experts_per_tok=moe.top_k, hidden_act="silu")
        config._experts_implementation = backend
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        for module, name, value in ((block.experts, "gate_up_proj", gate_up), (block.experts, "down_proj", down),
                                    (block.gate, "weight", moe.router.detach().to(dtype))):
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        blocks[backend] = block.eval()
    return blocks


def published_loop(block: nn.Module, top_k: int) -> Side:
    """The published arrangement on a Mixtral block's weights: experts one after the other, each on the tokens it finds."""
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj

    def forward(x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, block.gate.weight).float().softmax(-1).topk(top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        total = torch.zeros_like(x)
        for expert in range(len(gate_up)):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            if len(rows):
                gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, -1)
                total = total.index_add(0, rows, F.linear(F.silu(gate) * up, down[expert]) * weights[rows, place, None])
        return total

    return forward


def reference(moe: SharedMoe, x: Tensor) -> Tensor:
    """Materialised fp32 experts under the layer's own router: (N, d) -> (N, d) fp32."""
    x = x.float()
    _, weights, chosen = route(F.linear(x, moe.router), moe.top_k)
    total = 0
    for expert in range(moe.num_experts):
        w = moe.materialise(expert)
        share = (weights * (chosen == expert)).sum(1, keepdim=True)
        total = total + share * F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])
    return total


def error_of(side: Side, moe: SharedMoe, x: Tensor) -> float:
    """Relative distance of a side's output from the reference."""
    with torch.no_grad():
        want = reference(moe, x)
        return float((side(x).float() - want).norm() / want.norm())


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors made in a call and alive at once."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    class Watch(TorchDispatchMode):
        now = most = 0
        seen: set[int] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            made = function(*args, **(kwargs or {}))
            # what an operation hands through or changes in place was there before
            known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in known | self.seen:
                    self.seen.add(key)
                    self.now += (size := tensor.untyped_storage().nbytes())
                    self.most = max(self.most, self.now)
                    weakref.finalize(tensor.untyped_storage(), self.gone, key, size)
            return made

        def gone(self, key: int, size: int) -> None:
            self.seen.discard(key)
            self.now -= size

    with Watch() as watch:
        call()
    return watch.most


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; the call itself where it cannot be captured (it asks the device for numbers)."""
    stream, own = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    try:
        # a capture that breaks off leaves its stream and its memory behind: what waits for the device is found before
        torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError:
        return call
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.set_stream(own)
        torch.cuda.synchronize()
        return call
    return graph.replay


def race(sides: dict[str, Callable[[], Any]], pairs: int, device: str) -> dict[str, float]:
    """Median seconds of a call of each side; the sides take turns."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample(call: Callable[[], Any], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, call in sides.items():
        call()
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / sample(call, 1)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, call in sides.items():
            found[name].append(sample(call, calls[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def limits(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Operations per second of a large GEMM, bytes per second of a large copy (read and written); the best of some."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    long = torch.empty(2**28 if device == "cuda" else 2**26, device=device, dtype=torch.float32)
    other = torch.empty_like(long)
    with torch.no_grad():
        best = [race({"gemm": lambda: a @ b, "copy": lambda: other.copy_(long)}, 1, device) for _ in range(5)]
    return 2 * size**3 / min(t["gemm"] for t in best), 2 * long.nbytes / min(t["copy"] for t in best)


def backward(side: Side, parameters: Sequence[Tensor], x: Tensor) -> Callable[[], Any]:
    """Forward and backward to the input and the parameters of a side."""
    x = x.clone().requires_grad_()
    wanted = [x, *parameters]
    direction = torch.randn_like(x)
    return lambda: torch.autograd.grad(side(x), wanted, direction)
