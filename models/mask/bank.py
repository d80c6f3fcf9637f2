"""A model whose weights are theta_s + mask * D, written in place before each forward pass, without a graph through the mask.

Hooks turn each weight's gradient into that of its logits as soon as it is there (``concrete.logit_gradient``) and free
it. Masks are never stored between the passes: their noise is counted, and drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from models.mask.concrete import logit_gradient, mean_of, noise, prior_gradient, scale_for, slope, soft_mask
from models.mask.rules import combined, effective, ties_thresholds
from models.mask.settings import Settings
from models.mask.slots import Spec
from models.operators.spans import BLOCK


@dataclass(frozen=True)
class Draw:
    """Which mask a forward pass sees.

    Args:
        key: of the noise, e.g. seed, step and micro-step.
        temperature: of the soft mask, and of the slope.
        hard: zeros and ones in the forward pass, the soft mask's slope in the backward one (straight through).
        mirrored: 1 - u instead of u.
        trained: whether logits count; False: all 0, the published reference's random mask.
    """

    key: str
    temperature: float = 0.5
    hard: bool = False
    mirrored: bool = False
    trained: bool = True


@dataclass
class Slot:
    """A tensor that lives in the model.

    Args:
        live: the model's parameter; what the bank writes.
        base: theta_s, of the live type.
        deltas: theta_i - theta_s, or their weighted sum where the rule is linear.
        logits: place among the bank's logits; None: not masked.
    """

    spec: Spec
    live: nn.Parameter
    base: Tensor
    deltas: list[Tensor]
    logits: int | None
    counts: Tensor | None = None


class MaskBank(nn.Module):
    """Logits and the slots they govern.

    Args:
        slots: as ``make_slot`` gives them; ``logits`` is set here.
        logit_dtype: of the parameters that train.
    """

    def __init__(self, slots: Sequence[Slot], settings: Settings, init: float = 0.0,
                 logit_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.slots, self.settings = list(slots), settings
        self.logits = nn.ParameterList()
        self.names: list[str] = []
        for slot in self.slots:
            if slot.spec.units is None:
                continue
            slot.logits = len(self.names)
            slot.counts = slot.spec.units.counts
            if slot.counts is not None:
                slot.counts = slot.counts.to(slot.live.device)
            self.names.append(slot.spec.name)
            self.logits.append(nn.Parameter(torch.full((slot.spec.units.size,), init, dtype=logit_dtype,
                                                       device=slot.live.device)))
        self.draw: Draw | None = None
        self.weight = 1.0
        self.scales: dict[str, float] = {}
        self.thresholds: list[float] | None = None
        self.zero_masks = 0
        self._total = 0.0
        self._masked = sum(slot.live.numel() for slot in self.slots if slot.logits is not None)

    # ---- forward

    @torch.no_grad()
    def write(self, draw: Draw) -> None:
        """theta_s + fused task vectors under this draw's mask, into the live parameters."""
        self.draw, self._total, self.scales = draw, 0.0, {}
        if self.settings.rescale == "global" or self.settings.rule.name == "ties":
            self._measure(draw)
        for slot in self.slots:
            self._write(slot, draw)

    @torch.no_grad()
    def write_unmasked(self) -> None:
        """theta_s + the fused task vectors as they are."""
        self.draw = None
        if self.settings.rule.name == "ties":
            self.thresholds = ties_thresholds(self.settings.rule, self._plain, len(self.slots[0].deltas), self._size)
        for slot in self.slots:
            for first, count in _blocks(slot.live):
                one = torch.ones(1, device=slot.live.device)
                change = self._effective(slot, first, count, one, 1.0, "unmasked")
                _cut(slot.live, first, count).copy_(_cut(slot.base, first, count) + change)

    @torch.no_grad()
    def write_given(self, source: Callable[[Spec], Tensor]) -> None:
        """Any other values, e.g. of a reference model."""
        self.draw = None
        for slot in self.slots:
            slot.live.copy_(source(slot.spec))

    @property
    def _size(self) -> int:
        return sum(slot.live.numel() for slot in self.slots)

    def _plain(self) -> Iterator[list[Tensor]]:
        for slot in self.slots:
            for first, count in _blocks(slot.live):
                yield [_cut(d, first, count).float() for d in slot.deltas]

    def _write(self, slot: Slot, draw: Draw) -> None:
        flat = slot.live.detach().view(-1)
        # a mask is drawn where its weights will be: no second buffer
        mask, _ = self._drawn(slot, draw, room=flat if slot.spec.units and slot.spec.units.single else None)
        scale = self._scale(slot, mask)
        for first, count in _blocks(slot.live):
            m = _spread(slot, mask, first, count)
            change = self._effective(slot, first, count, m, scale, draw.key)
            torch.addcmul(_cut(slot.base, first, count), m, change, value=scale, out=flat[first:first + count])

    def _effective(self, slot: Slot, first: int, count: int, mask: Tensor, scale: float, key: str) -> Tensor:
        """D of a block, where the mask is ``scale`` times ``mask``."""
        deltas = [_cut(d, first, count) for d in slot.deltas]
        if self.settings.rule.linear:
            return deltas[0]
        return effective(self.settings.rule, deltas, (mask * scale).expand(count), self.thresholds,
                         f"{key}|{slot.spec.name}", first)

    def _drawn(self, slot: Slot, draw: Draw, with_slope: bool = False, room: Tensor | None = None,
               ) -> tuple[Tensor | None, Tensor | None]:
        """(mask of the slot's units, its slope where asked for), in ``room`` where it fits; None for a slot without mask."""
        if slot.logits is None:
            return None, None
        logits = self.logits[slot.logits]
        kind = torch.promote_types(logits.dtype, torch.float32)
        if room is None or room.dtype != kind:
            room = torch.empty(logits.numel(), dtype=kind, device=logits.device)
        rise = torch.empty_like(room) if with_slope else None
        for first, count in _blocks(logits):
            bits = noise(f"{draw.key}|{slot.spec.name}", first, count, logits.device)
            if draw.mirrored:
                bits = ~bits
            values = logits.detach()[first:first + count]
            part = soft_mask(values if draw.trained else torch.zeros_like(values), bits, draw.temperature,
                             room[first:first + count])
            if rise is not None:
                rise[first:first + count] = slope(part, draw.temperature)
            if draw.hard:
                part.gt_(0.5)
        return room, rise

    def _scale(self, slot: Slot, mask: Tensor | None) -> float:
        name, rescale = slot.spec.name, self.settings.rescale
        if mask is None or rescale == "none":
            return 1.0
        if name not in self.scales:
            values = torch.sigmoid(self.logits[slot.logits].detach().to(mask.dtype)) if rescale == "expected" else mask
            mean = mean_of(values, slot.counts)
            self.zero_masks += mean == 0
            self.scales[name] = scale_for(mean)
        return self.scales[name]

    def _measure(self, draw: Draw) -> None:
        """Scales and TIES thresholds, which need every tensor before the first is written."""
        if self.settings.rescale == "global":
            total = 0.0
            for slot in (s for s in self.slots if s.logits is not None):
                total += mean_of(self._drawn(slot, draw)[0], slot.counts) * _entries(slot)
            whole = sum(_entries(s) for s in self.slots if s.logits is not None)
            self.zero_masks += total == 0
            self.scales = dict.fromkeys(self.names, scale_for(total / whole))
        if self.settings.rule.name == "ties":
            self.thresholds = ties_thresholds(self.settings.rule, partial(self._walk, draw), len(self.slots[0].deltas),
                                              self._size)

    def _walk(self, draw: Draw) -> Iterator[list[Tensor]]:
        for slot in self.slots:
            mask, _ = self._drawn(slot, draw)
            scale = self._scale(slot, mask)
            for first, count in _blocks(slot.live):
                m = _spread(slot, mask, first, count) * scale
                yield [(_cut(d, first, count) * m).float() for d in slot.deltas]

    # ---- backward

    def attach(self) -> None:
        """Let the masked parameters' gradients flow into the logits' from now on."""
        for slot in self.slots:
            if slot.logits is not None:
                slot.live.requires_grad_(True)
                slot.live.register_post_accumulate_grad_hook(partial(self._backward, slot))

    @torch.no_grad()
    def _backward(self, slot: Slot, live: nn.Parameter) -> None:
        draw, gradient = self.draw, live.grad
        live.grad = None  # freed as soon as the next operation has read it
        if draw is None or not draw.trained:
            raise RuntimeError("a backward pass needs the draw that its forward pass saw: call write() first")
        rescale, logits, units = self.settings.rescale, self.logits[slot.logits], slot.spec.units
        mask, rise = self._drawn(slot, draw, with_slope=draw.hard)
        scale, kind = self._scale(slot, mask), mask.dtype
        # the gradient's own memory becomes G D, and with one logit per entry the logits' gradient
        reused = gradient.dtype == kind and gradient.is_contiguous()
        inner = gradient.view(-1) if reused else mask.new_empty(live.numel())
        for first, count in _blocks(live):
            change = self._effective(slot, first, count, _spread(slot, mask, first, count), scale, draw.key)
            torch.mul(_cut(gradient, first, count).to(kind), change, out=inner[first:first + count])
        del gradient
        inner = units.reduce(inner.view(units.matrix))
        total = sum(float(torch.dot(inner[first:first + count], mask[first:first + count]))
                    for first, count in _blocks(logits))
        self._total += total
        for first, count in _blocks(logits):
            block = slice(first, first + count)
            keep = torch.sigmoid(logits.detach()[block].to(kind)) if rescale == "expected" else None
            rising = slope(mask[block], draw.temperature, scale) if rise is None else rise[block].mul_(scale)
            logit_gradient(inner[block], mask[block], rising, scale, "detached" if rescale == "global" else rescale,
                           None if slot.counts is None else slot.counts[block], keep, total, int(_entries(slot)))
        if self.weight != 1:
            inner.mul_(self.weight)
        if logits.grad is None:
            logits.grad = inner.to(logits.dtype)
        else:
            logits.grad.add_(inner)

    @torch.no_grad()
    def finish(self) -> None:
        """After a backward pass: what only all tensors together tell (``global``)."""
        if self.settings.rescale != "global" or self.draw is None:
            return
        for slot in (s for s in self.slots if s.logits is not None):
            _, rise = self._drawn(slot, self.draw, with_slope=True)
            scale = self.scales[slot.spec.name]
            sizes = 1.0 if slot.counts is None else slot.counts.to(rise.dtype)
            self.logits[slot.logits].grad.sub_(rise.mul_(scale * scale * self._total / self._masked_entries).mul_(sizes),
                                               alpha=self.weight)

    @property
    def _masked_entries(self) -> float:
        return sum(_entries(s) for s in self.slots if s.logits is not None)

    @torch.no_grad()
    def add_prior_gradient(self, prior: float, weight: float) -> None:
        """weight x mean over entries of KL(Bernoulli(sigmoid(s)) || Bernoulli(prior)): pulls the kept share to ``prior``."""
        for slot in (s for s in self.slots if s.logits is not None):
            logits = self.logits[slot.logits]
            sizes = 1.0 if slot.counts is None else slot.counts.float()
            found = prior_gradient(logits.detach(), prior).mul_(sizes).mul_(weight / self._masked_entries)
            if logits.grad is None:
                logits.grad = torch.zeros_like(logits)
            logits.grad.add_(found)

    # ---- state

    def named_logits(self) -> dict[str, Tensor]:
        """Tensor name -> logits."""
        return dict(zip(self.names, (p.detach() for p in self.logits), strict=True))

    @torch.no_grad()
    def load_logits(self, values: Mapping[str, Tensor]) -> None:
        """Set the logits.

        Raises:
            ValueError: other names than this bank's.
        """
        if set(values) != set(self.names):
            raise ValueError("these logits are not of this mask")
        for name, parameter in zip(self.names, self.logits, strict=True):
            parameter.copy_(values[name])


def make_slot(spec: Spec, live: nn.Parameter, base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Slot:
    """A slot with its tensors in the live parameter's type, on its device; linear rules keep one tensor for all tasks."""
    kept = [d.to(live.device, live.dtype).contiguous() for d in combined(settings.rule, deltas)]
    return Slot(spec, live, base.to(live.device, live.dtype).contiguous(), kept, None)


def mirrored(draw: Draw) -> Draw:
    """The antithetic twin of a draw."""
    return replace(draw, mirrored=not draw.mirrored)


def _entries(slot: Slot) -> float:
    return float(slot.spec.units.size if slot.counts is None else slot.counts.sum())


def _blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks that fit a core's cache; on a GPU one block, which is one kernel per operation."""
    size = tensor.numel()
    step = BLOCK if tensor.device.type == "cpu" else max(size, 1)
    for first in range(0, size, step):
        yield first, min(step, size - first)


def _cut(tensor: Tensor, first: int, count: int) -> Tensor:
    return tensor.detach().view(-1)[first:first + count]


def _spread(slot: Slot, mask: Tensor | None, first: int, count: int) -> Tensor:
    """The mask of a block's entries, (count,) or (1,)."""
    if mask is None:
        return torch.ones(1, device=slot.live.device)
    if slot.spec.units.single:
        return mask[first:first + count]
    matrix = slot.spec.matrix
    whole = slot.spec.units.expand(mask)
    if whole.numel() == 1:
        return whole.reshape(1)
    columns = matrix[1]
    top, bottom = first // columns, -(-(first + count) // columns)
    rows = whole if whole.shape[0] == 1 else whole[top:bottom]
    start = first - top * columns
    return rows.expand(bottom - top, columns).reshape(-1)[start:start + count]
