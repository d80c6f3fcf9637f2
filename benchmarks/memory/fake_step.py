"""A tuning step with fake tensors, its living bytes counted: what ``tuning_step.py`` prints."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import config
from flags import AlignArgs
from models.moe.files import install
from models.moe.layer import TuningConfig
from training.moe import MoeLoss, prepare

_EXPERTS = ("helpfulness", "safety", "truthfulness")


@dataclass(frozen=True)
class Shape:
    """A Llama, its fused experts, and a batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    rank: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Held:
    """Bytes: weights and factors before the first step; after a forward pass; after a step; the most at any time."""

    weights: int
    after_forward: int
    after_step: int
    peak: int


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._count, out)
        return out

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def moe_step(shape: Shape, checkpointing: bool) -> Held:
    """A second tuning step: by then the optimiser has its moments."""
    loss = _loss(shape)
    living = Living()
    # the tensors of no size in autograd's own bookkeeping are real ones
    with FakeTensorMode(allow_non_fake_inputs=True), living:
        _fill(loss)
        weights = living.now
        if checkpointing:
            loss.activation_checkpointing_enable()
        # one parameter after the other, as a fused kernel does: foreach would make lists of temporaries
        optimiser = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], foreach=False)
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
        for _ in range(2):
            parts = loss(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros_like(ids),
                         objectives=torch.zeros(shape.rows, dtype=torch.long),
                         predicting=torch.zeros(ids.numel() // 2, dtype=torch.long))
            total = parts["lm"] / ids.numel() + parts["gate"] + sum(parts[name] for name in parts if "drift" in name)
            after_forward = living.now
            total.backward()
            optimiser.step()
            optimiser.zero_grad()
            del parts, total
        return Held(weights, after_forward, living.now, living.peak)


def _loss(shape: Shape) -> MoeLoss:
    """The loss module of a tuning, its weights on no device."""
    args = config.parse(AlignArgs, ["--moe_flag", "1", "--gate_loss_weight", "0.1", "--helpfulness_weight", "0.001"]).args
    sizes = LlamaConfig(vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, tie_word_embeddings=False)
    experts, r, d, f = len(_EXPERTS), shape.rank, shape.hidden, shape.intermediate
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes).to(torch.bfloat16)
        factors = [{name: (torch.empty(experts, r, a), torch.empty(experts, b, r))
                    for name, a, b in (("gate", d, f), ("up", d, f), ("down", f, d))} for _ in range(shape.layers)]
        install(model, factors, [torch.empty(experts, d) for _ in range(shape.layers)], args.expert_topk)
        tuning = TuningConfig(r, r / 2, 0.1)
        prepare(model, args, tuning, tuning)
        return MoeLoss(model, torch.bfloat16, _EXPERTS, args).train()


def _fill(module: nn.Module) -> None:
    """Fake tensors in place of those on no device: autocast and devices are then those of a real step."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = made.get(id(old))
                part._parameters[name] = made[id(old)] = new if new is not None else nn.Parameter(
                    torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
