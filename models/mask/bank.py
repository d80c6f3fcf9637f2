"""A model whose weights are theta_s + mask * D, written in place before each forward pass, without a graph through the mask.

Hooks turn each weight's gradient into that of its logits as soon as it is there (``rescale``: the equations) and free it.
Masks are never stored between the passes: their noise is counted, and drawn again. So beside weights, task vectors and
logits a step holds one tensor's gradient, mask and slope, whatever the model's size (spec section 4.7).

Of a model that FSDP2 parts each process has rows of every tensor, with their task vectors and logits. Its noise starts at
the rows' place in the whole, so that all draw one mask, however many they are; two numbers of each tensor go round, the
mask's sum and T (``rescale``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from models.base.parted import is_parted, own_part, parted_like, same_rows, summed
from models.checkpoints.parts import copy_whole
from models.mask.blocks import blocks, length, piece, spread
from models.mask.concrete import noise, prior_gradient, scale_for, soft_mask, soft_slope, sum_of
from models.mask.fused.launch import FusedDraws, device_bits, has_triton
from models.mask.live import Draw, Slot
from models.mask.rescale import RESCALINGS, LogitBlock, Scale, joint_mean_part
from models.mask.rules import combined, effective, ties_thresholds
from models.mask.settings import Settings
from models.mask.slots import Spec


class MaskBank(nn.Module):
    """Logits and the slots they govern.

    Args:
        slots: as ``make_slot`` gives them; ``logits_index`` and ``counts`` are set here.
        logit_dtype: of the parameters that train; flat, of a parted tensor (rows, units in a row), parted likewise.
        changed: called before live weights change, to let go of copies of them.

    ``weight`` multiplies every gradient (1 / draws, where a step averages several); ``scales`` (tensor name -> what its mask
    was multiplied by) and ``thresholds`` (TIES, per task) are the last ``write``'s. On a GPU ``fused`` does what it can in a
    few kernels a tensor (``models/mask/fused/launch.py``) and keeps their scales itself.
    """

    def __init__(self, slots: Sequence[Slot], settings: Settings, init: float = 0.0,
                 logit_dtype: torch.dtype = torch.float32, changed: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.slots, self.settings, self.changed = list(slots), settings, changed
        self.rescaling = RESCALINGS[settings.rescale]
        self.logits = nn.ParameterList()
        self.names: list[str] = []
        for slot in self.slots:
            units, device = slot.units, slot.weights.device
            if units is None:
                continue
            slot.logits_index = len(self.names)
            counts = units.counts  # counted anew at every call, so called once
            slot.counts = None if counts is None else counts.to(device)
            self.names.append(slot.spec.name)
            shape = units.grid if is_parted(slot.live) else (units.size,)
            start = torch.full(shape, init, dtype=logit_dtype, device=device)
            self.logits.append(nn.Parameter(parted_like(start, slot.live, slot.spec.required_units.grid)))
        self.masked = [slot for slot in self.slots if slot.logits_index is not None]
        self.draw: Draw | None = None
        self.weight = 1.0
        self.scales: dict[str, float] = {}
        self.thresholds: list[float] | None = None
        self._zero_masks = 0
        self.fused = FusedDraws(self.masked, settings, own_part(self.logits[0]).device) if self.masked else None
        self._joint_scale_gradient = 0.0

    @property
    def zero_masks(self) -> int:
        """Masks that were zero throughout, so far."""
        return self._zero_masks + (self.fused.zero_masks if self.fused else 0)

    @zero_masks.setter
    def zero_masks(self, count: int) -> None:
        self._zero_masks = count - (self.fused.zero_masks if self.fused else 0)

    # ---- forward

    @torch.no_grad()
    def write(self, draw: Draw) -> None:
        """theta_s + fused task vectors under this draw's mask, into the live parameters."""
        self.changed()
        self.draw, self.scales, self._joint_scale_gradient = draw, {}, 0.0
        # both need every tensor's mask before the first is written; the order matters: TIES cuts rescaled masks
        if self.rescaling.joint:
            self._measure_joint_scale(draw)
        if self.settings.rule.name == "ties":
            self._measure_thresholds(partial(self._masked_vectors, draw))
        for slot in self.slots:
            self._write(slot, draw)

    @torch.no_grad()
    def write_unmasked(self) -> None:
        """theta_s + the fused task vectors as they are."""
        self.changed()
        self.draw = None
        if self.settings.rule.name == "ties":
            self._measure_thresholds(self._unmasked_vectors)
        for slot in self.slots:
            no_mask = torch.ones(1, device=slot.weights.device)
            for block in blocks(slot.weights):
                change = self._fused_change(slot, block, no_mask, 1.0, "unmasked")
                piece(slot.weights, block).copy_(piece(slot.base, block) + change)

    @torch.no_grad()
    def write_given(self, source: Callable[[Spec], Tensor]) -> None:
        """Any other values, e.g. of a reference model; ``source`` gives whole tensors."""
        self.changed()
        self.draw = None
        for slot in self.slots:
            slot.weights.copy_(same_rows(source(slot.spec), slot.live))

    def _kernels(self, slot: Slot, draw: Draw) -> FusedDraws | None:
        """What does a slot's draw in kernels; None where this module's own operations do it."""
        fused = self.fused
        return fused if fused is not None and slot.logits_index is not None and fused.serves(slot, draw) else None

    def _write(self, slot: Slot, draw: Draw) -> None:
        if (kernels := self._kernels(slot, draw)) is not None:
            kernels.write(slot, self.logits[slot.logits_index].detach(), draw)
            return
        weights = slot.weights.detach().view(-1)
        # a mask with a logit per entry is drawn where its weights will be: no second buffer
        mask, _ = self._drawn(slot, draw, room=weights if slot.units and slot.units.single else None)
        scale = self._scale(slot, mask)
        for block in blocks(weights):
            block_mask = spread(slot.units, mask, block, weights.device)
            change = self._fused_change(slot, block, block_mask, scale, draw.key)
            # elementwise, so that it may write over the mask that it reads
            torch.addcmul(piece(slot.base, block), block_mask, change, value=scale, out=weights[block])

    def _fused_change(self, slot: Slot, block: slice, mask: Tensor, scale: float, key: str) -> Tensor:
        """D of a block, (block,), where the mask is ``scale`` times ``mask`` ((block,) or (1,))."""
        deltas = [piece(delta, block) for delta in slot.deltas]
        if self.settings.rule.linear:
            return deltas[0]
        return effective(self.settings.rule, deltas, (mask * scale).expand(length(block)), self.thresholds,
                         f"{key}|{slot.spec.name}", slot.first + block.start)

    def _drawn(self, slot: Slot, draw: Draw, with_slope: bool = False, room: Tensor | None = None,
               ) -> tuple[Tensor | None, Tensor | None]:
        """A slot's mask and its slope dm/ds where asked for, (units,) each; None for a slot without a mask.

        Args:
            room: where the mask shall be; taken when its type fits.
        """
        if slot.logits_index is None:
            return None, None
        logits = self._own_logits(slot)
        # as wide as soft_mask computes: fp32 also for logits and weights in bfloat16
        dtype = torch.promote_types(logits.dtype, torch.float32)
        mask = room if room is not None and room.dtype == dtype else torch.empty(logits.numel(), dtype=dtype,
                                                                                 device=logits.device)
        slope = torch.empty_like(mask) if with_slope else None
        for block in blocks(logits):
            values = piece(logits, block)
            if draw.expected:
                torch.sigmoid(values.to(dtype), out=mask[block])
                continue
            bits = self._bits(slot, draw, block)
            drawn = soft_mask(values if draw.trained else torch.zeros_like(values), ~bits if draw.mirrored else bits,
                              draw.temperature, out=mask[block])
            if slope is not None:
                slope[block] = soft_slope(drawn, draw.temperature)
            if draw.hard:
                drawn.gt_(0.5)  # after the slope, which is the soft draw's: straight through
        return mask, slope

    def _own_logits(self, slot: Slot) -> Tensor:
        """The logits of the units that lie here, (units,), without a graph."""
        return own_part(self.logits[slot.logits_index]).detach().view(-1)

    def _bits(self, slot: Slot, draw: Draw, block: slice) -> Tensor:
        """The noise of a block of the units that lie here, (block,) int16."""
        key, device = f"{draw.key}|{slot.spec.name}", slot.weights.device
        first = slot.first_unit + block.start
        if device.type == "cpu" or not is_parted(slot.live):
            return noise(key, first, length(block), device)
        # a GPU's streams start at 0 only, and one process would draw this tensor in one go: by Triton's, where kernels serve
        count = slot.spec.required_units.size
        by_triton = has_triton() and self.fused is not None and self.fused.fits(slot, draw)
        whole = device_bits(key, count, device) if by_triton else noise(key, 0, count, device)
        return whole[first:first + length(block)]

    def _scale(self, slot: Slot, mask: Tensor | None) -> float:
        """1 / mu, what the slot's mask is multiplied by; measured once a draw, then remembered for the backward pass."""
        if mask is None or self.rescaling.measured is None:
            return 1.0
        name = slot.spec.name
        if name not in self.scales:
            total = sum_of(self.rescaling.measured(mask, self._own_logits(slot)), slot.counts)
            mean = summed(total, slot.live) / slot.entries if slot.entries else 1.0
            self._zero_masks += mean == 0
            self.scales[name] = scale_for(mean)
        return self.scales[name]

    def _measure_joint_scale(self, draw: Draw) -> None:
        """1 / the mean over all masks, one for all tensors."""
        total = sum(summed(sum_of(self._drawn(slot, draw)[0], slot.counts), slot.live) for slot in self.masked)
        self._zero_masks += total == 0
        self.scales = dict.fromkeys(self.names, scale_for(total / self._masked_entries))

    def _measure_thresholds(self, vectors: Callable[[], Iterator[list[Tensor]]]) -> None:
        """TIES' cuts; ``vectors`` walks over (block,) of every task, and is walked more than once."""
        self.thresholds = ties_thresholds(self.settings.rule, vectors, len(self.slots[0].deltas),
                                          sum(slot.live.numel() for slot in self.slots))

    def _masked_vectors(self, draw: Draw) -> Iterator[list[Tensor]]:
        for slot in self.slots:
            mask, _ = self._drawn(slot, draw)
            scale = self._scale(slot, mask)
            for block in blocks(slot.weights):
                block_mask = spread(slot.units, mask, block, slot.weights.device) * scale
                yield [(piece(delta, block) * block_mask).float() for delta in slot.deltas]

    def _unmasked_vectors(self) -> Iterator[list[Tensor]]:
        for slot in self.slots:
            for block in blocks(slot.weights):
                yield [piece(delta, block).float() for delta in slot.deltas]

    # ---- backward

    def attach(self) -> None:
        """Let the masked parameters' gradients flow into the logits' from now on."""
        for slot in self.masked:
            slot.live.requires_grad_(True)
            slot.live.register_post_accumulate_grad_hook(partial(self._backward, slot))

    @torch.no_grad()
    def _backward(self, slot: Slot, live: nn.Parameter) -> None:
        """The gradient of one tensor's logits, as soon as G = live.grad is there (equations: ``rescale``)."""
        draw = self.draw
        if draw is None or not draw.trained:
            live.grad = None
            raise RuntimeError("a backward pass needs the draw that its forward pass saw: call write() first")
        logits = self.logits[slot.logits_index]
        if (kernels := self._kernels(slot, draw)) is not None:
            gradient, live.grad = live.grad, None
            logits.grad = kernels.backward(slot, logits.detach(), draw, gradient, self.weight, logits.grad)
            return
        # a soft mask tells its slope, block by block; a hard one does not, and its soft draw is gone
        mask, slope = self._drawn(slot, draw, with_slope=draw.hard)
        scale = self._scale(slot, mask)
        # with a logit per entry a sum over its unit is a view: G's own memory becomes the logits' gradient
        units = slot.required_units
        mask_gradient = units.reduce(self._entry_gradient(slot, mask, scale, draw).view(units.matrix))
        gradient = self._logit_gradient(slot, mask_gradient, mask, slope, scale, draw.temperature)
        if self.weight != 1:
            gradient.mul_(self.weight)
        self._add_gradient(logits, gradient)

    def _add_gradient(self, logits: nn.Parameter, gradient: Tensor) -> None:
        """Add the gradient of the units that lie here, (units,), to what their logits have; it may become theirs."""
        if logits.grad is None:
            own = gradient.to(logits.dtype).view(own_part(logits).shape)
            logits.grad = parted_like(own, logits, logits.shape)
        else:
            own_part(logits.grad).view(-1).add_(gradient)

    def _entry_gradient(self, slot: Slot, mask: Tensor, scale: float, draw: Draw) -> Tensor:
        """G D of every entry, flat and in the mask's type; takes G off the live parameter, and its memory where it fits."""
        gradient, slot.live.grad = own_part(slot.live.grad), None  # this name alone keeps it: gone on return unless reused
        fits = gradient.dtype == mask.dtype and gradient.is_contiguous()
        product = gradient.view(-1) if fits else mask.new_empty(gradient.numel())
        for block in blocks(product):
            block_mask = spread(slot.units, mask, block, mask.device)
            change = self._fused_change(slot, block, block_mask, scale, draw.key)
            # the product in the mask's type, so that a bfloat16 G is rounded no more
            torch.mul(piece(gradient, block).to(mask.dtype), change, out=product[block])
        return product

    def _logit_gradient(self, slot: Slot, mask_gradient: Tensor, mask: Tensor, slope: Tensor | None, scale: float,
                        temperature: float) -> Tensor:
        """dL/ds of a slot's units, in place of their mask gradient; all tensors (units,).

        Args:
            slope: dm/ds where the mask does not tell it; scaled in place.
        """
        logits = self._own_logits(slot)
        # a dot product a block: fp32 sums stay short, and add up in double precision
        own = sum(float(torch.dot(mask_gradient[block], mask[block])) for block in blocks(logits))
        scale_gradient = summed(own, slot.live)
        self._joint_scale_gradient += scale_gradient
        own_scale = Scale(scale, scale_gradient, slot.entries)
        for block in blocks(logits):
            scaled_slope = soft_slope(mask[block], temperature, scale) if slope is None else slope[block].mul_(scale)
            self.rescaling.gradient(LogitBlock(mask_gradient[block], scaled_slope, logits[block],
                                               slot.counts_as(mask.dtype, block)), own_scale)
        return mask_gradient

    @torch.no_grad()
    def finish(self) -> None:
        """After a backward pass: the part of a joint mean, whose gradient only all tensors together tell."""
        if not self.rescaling.joint or self.draw is None:
            return
        entries = self._masked_entries
        for slot in self.masked:
            _, slope = self._drawn(slot, self.draw, with_slope=True)
            if slope is None:
                raise ValueError(f"{slot.spec.name}: is not masked")
            joint_scale = Scale(self.scales[slot.spec.name], self._joint_scale_gradient, entries)
            mean_part = joint_mean_part(slope, joint_scale, slot.counts_as(slope.dtype))
            self._add_gradient(self.logits[slot.logits_index], mean_part.mul_(-self.weight))

    @property
    def _masked_entries(self) -> float:
        return sum(slot.entries for slot in self.masked)

    @torch.no_grad()
    def add_prior_gradient(self, prior: float, weight: float) -> None:
        """weight x mean over entries of KL(Bernoulli(sigmoid(s)) || Bernoulli(prior)): pulls the kept share to ``prior``."""
        entries = self._masked_entries
        for slot in self.masked:
            gradient = prior_gradient(self._own_logits(slot), prior).mul_(slot.counts_as(torch.float32))
            self._add_gradient(self.logits[slot.logits_index], gradient.mul_(weight / entries))

    # ---- state

    def named_logits(self, whole: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Tensor name -> logits, (units,); of parted ones ``whole`` tensors in the same order stand for them."""
        return dict(zip(self.names, (p.detach().view(-1) for p in whole or self.logits), strict=True))

    @torch.no_grad()
    def load_logits(self, values: Mapping[str, Tensor]) -> None:
        """Set the logits, each (units,).

        Raises:
            ValueError: other names than this bank's.
        """
        if set(values) != set(self.names):
            raise ValueError("these logits are not of this mask")
        for name, parameter in zip(self.names, self.logits, strict=True):
            copy_whole(parameter, values[name].view(parameter.shape))


def make_slot(spec: Spec, live: nn.Parameter, base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Slot:
    """A slot with its tensors in the live parameter's type, on its device; linear rules keep one tensor for all tasks."""
    # summed in fp32, then rounded to the live type once; contiguous: ``blocks`` walks over them flat
    base, *stored = (same_rows(tensor, live).to(own_part(live).device, live.dtype).contiguous()
                     for tensor in (base, *combined(settings.rule, deltas)))
    return Slot(spec, live, base, stored, None)


def mirrored(draw: Draw) -> Draw:
    """The antithetic twin of a draw."""
    return replace(draw, mirrored=not draw.mirrored)
