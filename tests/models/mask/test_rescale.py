"""The rows of --rescale against autograd in double precision, each on its own, and the mean that all tensors share."""

from __future__ import annotations

import pytest
import torch

from models.mask.concrete import mean_of, scale_for, soft_slope
from models.mask.rescale import RESCALES, RESCALINGS, LogitBlock, Scale, joint_mean_part
from models.mask.settings import Settings
from models.mask.slots import Spec, check_units
from models.mask.units import Units

TEMPERATURE, UNITS = 0.4, 7


def drawn(seed: int):
    """(logits that want a gradient, a soft mask as a graph through them, the mask gradient c, entries per unit)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(UNITS, generator=generator, dtype=torch.float64).requires_grad_()
    noise = torch.rand(UNITS, generator=generator, dtype=torch.float64)
    mask = torch.sigmoid((logits + noise.logit()) / TEMPERATURE)
    mask_gradient = torch.randn(UNITS, generator=generator, dtype=torch.float64)
    return logits, mask, mask_gradient, torch.randint(1, 9, (UNITS,), generator=generator).double()


def mean(values, counts):
    return values.mean() if counts is None else (values * counts).sum() / counts.sum()


def by_hand(name, logits, mask, mask_gradient, counts):
    """The gradient of sum_j c_j a m_j as the row computes it."""
    row, mask, logits = RESCALINGS[name], mask.detach(), logits.detach()
    value = 1.0 if row.measured is None else scale_for(mean_of(row.measured(mask, logits), counts))
    scale = Scale(value, float(mask_gradient @ mask), float(UNITS if counts is None else counts.sum()))
    entries = 1.0 if counts is None else counts
    block = LogitBlock(mask_gradient.clone(), soft_slope(mask, TEMPERATURE, value), logits, entries)
    gradient = row.gradient(block, scale)
    assert gradient.data_ptr() == block.mask_gradient.data_ptr()
    return gradient


@pytest.mark.parametrize("weighed", [False, True], ids=["one entry a unit", "units of several sizes"])
@pytest.mark.parametrize("name", [name for name in RESCALES if name != "global"])
def test_each_row_is_autograds_gradient(name, weighed):
    logits, mask, mask_gradient, counts = drawn(1)
    counts = counts if weighed else None
    mu = {"none": torch.ones(()), "tensor": mean(mask, counts), "detached": mean(mask, counts).detach(),
          "expected": mean(torch.sigmoid(logits), counts)}[name]
    (mask_gradient * mask / mu).sum().backward()
    torch.testing.assert_close(by_hand(name, logits, mask, mask_gradient, counts), logits.grad, rtol=1e-12, atol=1e-12)


def test_a_joint_mean_is_what_the_rows_step_leaves_out():
    tensors = [drawn(seed) for seed in range(3)]
    entries = sum(float(counts.sum()) for *_, counts in tensors)
    mu = sum((mask * counts).sum() for _, mask, _, counts in tensors) / entries
    sum((c * mask / mu).sum() for _, mask, c, _ in tensors).backward()
    joint = Scale(1 / mu.item(), sum(float(c @ mask.detach()) for _, mask, c, _ in tensors), entries)
    for logits, mask, c, counts in tensors:
        slope = soft_slope(mask.detach(), TEMPERATURE)
        block = LogitBlock(c.clone(), slope * joint.value, logits.detach(), counts)
        gradient = RESCALINGS["global"].gradient(block, joint) - joint_mean_part(slope.clone(), joint, counts)
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-12)


def test_what_the_rows_are():
    assert [name for name, row in RESCALINGS.items() if row.joint] == ["global"]
    assert [name for name, row in RESCALINGS.items() if row.expected] == ["expected"]
    assert [name for name, row in RESCALINGS.items() if row.measured is None] == ["none"]


@pytest.mark.parametrize("name", RESCALES)
def test_a_mask_that_divides_itself_away_is_refused(name):
    from errors import UserError

    spec = Spec("w", "w", "weight", (4, 3), Units((4, 3), 4, 3))
    settings = Settings(granularity="layer", rescale=name)
    if name in ("tensor", "detached"):
        with pytest.raises(UserError, match=f"--rescale {name}"):
            check_units([spec], settings)
    else:
        check_units([spec], settings)
