"""Every realignment method and rule against a few lines of its formula, on tensors made by hand."""

from __future__ import annotations

import pytest
import torch

from flags.realign import REALIGN_METHODS, REALIGN_RULES
from models.operators.selection import count, find_cuts
from models.realign import methods as rows
from models.realign.formulas import WeightInputs, projected, realigned
from models.realign.methods import METHODS, RULES, parameter_help


def draw(purpose, which, shape):
    seed = sum(map(ord, purpose)) * 31 + which
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def deltas(count=2, shape=(4, 5)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def largest(tensors, share):
    k = count(share, tensors[0].numel())
    return [cut for (cut,) in find_cuts(lambda: [tensors], [[k]] * len(tensors), tensors[0].numel())]


def apply(method, p=None, rule="", q=None, tensors=None, **inputs):
    tensors = deltas(1) if tensors is None else tensors
    part = WeightInputs([t.clone() for t in tensors], draw, **inputs)
    p, q = p or METHODS[method].parameters(), q or RULES[rule].parameters()
    return realigned(part, METHODS[method], p, RULES[rule], q), part


def test_the_tables_of_flags_are_the_tables_of_methods():
    assert tuple(METHODS) == REALIGN_METHODS
    assert tuple(RULES) == REALIGN_RULES
    text = parameter_help()
    assert all(f"--method {name}" in text for name in METHODS)
    assert "alpha: 0: the aligned model, 1: the tuned one (must be given)" in text


def test_one_task_keeps_its_vector_and_several_need_a_rule():
    (delta,) = deltas(1)
    assert torch.equal(apply("merge")[0], delta)
    with pytest.raises(ValueError, match="unpack"):
        apply("merge", tensors=deltas(2))


def test_wise_ft_is_the_line():
    aligned, (delta,) = torch.randn(4, 5), deltas(1)
    fused, _ = apply("wise_ft", rows.WiseFt(alpha=0.3))
    torch.testing.assert_close(aligned + fused, (1 - 0.3) * aligned + 0.3 * (aligned + delta))


def test_task_arithmetic_and_average():
    one, two = deltas()
    torch.testing.assert_close(apply("merge", rule="task_arithmetic", tensors=[one, two])[0], 0.3 * (one + two))
    torch.testing.assert_close(apply("merge", rule="average", tensors=[one, two])[0], (one + two) / 2)


def test_dare_drops_and_rescales():
    (delta,) = deltas(1)
    fused, _ = apply("dare", rows.Dare(drop=0.3))
    keep = draw("dare", 0, (4, 5)) >= 0.3
    torch.testing.assert_close(fused, torch.where(keep, delta / 0.7, torch.zeros(())))
    assert 0 < int(keep.sum()) < 20
    assert torch.equal(apply("dare", rows.Dare(drop=0.0))[0], delta)


def test_dare_as_a_rule_draws_for_each_task():
    one, two = deltas()
    fused, _ = apply("merge", rule="dare", tensors=[one, two])
    want = sum(d * (draw("rule", i, (4, 5)) >= 0.2) / 0.8 for i, d in enumerate((one, two)))
    torch.testing.assert_close(fused, 0.3 * want)


def test_ties_trims_elects_and_adds_what_agrees():
    one, two = torch.tensor([[3.0, -1.0, 0.2, 4.0]]), torch.tensor([[-2.0, -5.0, 6.0, 0.1]])
    fused, _ = apply("merge", rule="ties", q=rows.Ties(density=0.5, lambda_=0.4), tensors=[one, two],
                     rule_cuts=largest([one, two], 0.5))
    # kept: (3, ., ., 4) and (., -5, 6, .): no conflict is left
    torch.testing.assert_close(fused, 0.4 * torch.tensor([[3.0, -5.0, 6.0, 4.0]]))
    fused, _ = apply("merge", rule="ties", q=rows.Ties(density=1.0, lambda_=1.0), tensors=[one, two],
                     rule_cuts=largest([one, two], 1.0))
    # signs of the sums: + - + +; -2 and nothing else disagrees; agreeing values are added, not averaged
    torch.testing.assert_close(fused, torch.tensor([[3.0, -6.0, 6.2, 4.1]]))


def test_resta_adds_the_safety_vector_after_dare_when_told():
    (delta,), safety = deltas(1), torch.randn(4, 5)
    torch.testing.assert_close(apply("resta", rows.Resta(gamma=0.2), alignment=safety)[0], delta + 0.2 * safety)
    fused, _ = apply("resta", rows.Resta(gamma=0.2, drop=0.3), alignment=safety)
    dropped = delta * (draw("dare", 0, (4, 5)) >= 0.3) / 0.7
    torch.testing.assert_close(fused, dropped + 0.2 * safety)
    assert torch.equal(apply("resta")[0], delta)


def test_the_random_mask_keeps_its_share_and_is_the_same_for_all_tasks():
    one, two = deltas(2, (200, 100))
    fused, part = apply("random_mask", rows.RandomMask(kept=0.3, rescale=False), "task_arithmetic", tensors=[one, two])
    mask = (draw("mask", 0, (200, 100)) < 0.3).float()
    torch.testing.assert_close(fused, 0.3 * mask * (one + two))
    assert part.notes["kept"] == pytest.approx(0.3, abs=0.02)
    rescaled, part = apply("random_mask", rows.RandomMask(kept=0.3), tensors=[one])
    torch.testing.assert_close(rescaled, one * mask / mask.mean())


def test_a_soft_random_mask_is_the_concrete_draw_of_an_untrained_mask():
    (delta,) = deltas(1, (300, 200))
    fused, part = apply("random_mask", rows.RandomMask(kept=0.5, soft=True), tensors=[delta])
    u = draw("mask", 0, (300, 200)).clamp(1e-6, 1 - 1e-6)
    mask = torch.sigmoid((torch.log(u) - torch.log(1 - u)) / 0.5)
    torch.testing.assert_close(fused, delta * mask / mask.mean())
    # spec section 4.4: a soft draw multiplies each scalar by a factor with standard deviation 0.76
    assert float((mask / mask.mean()).std()) == pytest.approx(0.76, abs=0.01)
    assert part.notes["kept"] == pytest.approx(0.5, abs=0.01)


def test_a_mask_that_keeps_nothing_gives_zero_not_nan():
    fused, _ = apply("random_mask", rows.RandomMask(kept=1e-6), tensors=[torch.ones(3)])
    assert torch.equal(fused, torch.zeros(3))


def test_the_magnitude_mask_keeps_the_largest():
    delta = torch.tensor([[1.0, -4.0, 3.0, 0.5]])
    fused, _ = apply("magnitude", rows.Magnitude(kept=0.5), tensors=[delta], cuts=largest([delta], 0.5))
    assert torch.equal(fused, torch.tensor([[0.0, -4.0, 3.0, 0.0]]))
    fused, _ = apply("magnitude", rows.Magnitude(kept=0.5, rescale=True), tensors=[delta], cuts=largest([delta], 0.5))
    assert torch.equal(fused, torch.tensor([[0.0, -8.0, 6.0, 0.0]]))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_projection_is_the_papers_and_the_exact_one_is_orthogonal(shape):
    v, change = torch.randn(shape[0], 2) @ torch.randn(2, shape[1]), torch.randn(shape)
    torch.testing.assert_close(projected(change, v, exact=False), v @ v.T @ change / v.norm(), atol=1e-5, rtol=1e-4)
    inside = projected(change, v, exact=True)
    torch.testing.assert_close(inside, v @ torch.linalg.pinv(v) @ change, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(projected(inside, v, exact=True), inside, atol=1e-5, rtol=1e-4)


def test_safe_lora_projects_below_tau_only():
    (change,), v = deltas(1), torch.zeros(4, 5)
    v[0] = torch.arange(1.0, 6.0)
    inside = v @ v.T @ change / v.norm()
    cosine = float((inside * change).sum() / (inside.norm() * change.norm()))
    assert 0 < cosine < 1
    below, part = apply("safe_lora", rows.SafeLora(tau=cosine + 0.01), alignment=v)
    torch.testing.assert_close(below, inside)
    assert part.notes["cosine"] == pytest.approx(cosine, rel=1e-5)
    assert part.notes["changed"] == 1
    above, part = apply("safe_lora", rows.SafeLora(tau=cosine - 0.01), alignment=v)
    assert torch.equal(above, change)
    assert "changed" not in part.notes
    # no subspace, or a norm's vector: the change stays
    assert torch.equal(apply("safe_lora", rows.SafeLora(tau=1.0), alignment=torch.zeros(4, 5))[0], change)
    assert torch.equal(apply("safe_lora", rows.SafeLora(tau=1.0), tensors=[torch.ones(3)], alignment=torch.ones(3))[0],
                       torch.ones(3))


def test_safe_merge_mixes_the_flagged_layers():
    (change,), v, safe = deltas(1), torch.zeros(4, 5), torch.randn(4, 5)
    v[0] = 1
    mixed, part = apply("safe_merge", rows.SafeMerge(tau=1.0, alpha=0.7), alignment=v, safe=safe)
    torch.testing.assert_close(mixed, 0.7 * change + 0.3 * safe)
    assert part.notes["changed"] == 1
    assert torch.equal(apply("safe_merge", rows.SafeMerge(tau=-1.0), alignment=v, safe=safe)[0], change)
    torch.testing.assert_close(apply("safe_merge", rows.SafeMerge(tau=1.0, alpha=0.7), alignment=v)[0], 0.7 * change)


@pytest.mark.parametrize(("method", "text", "says"), [
    ("wise_ft", "", "needs alpha"), ("wise_ft", "alpha=2", "out of range; allowed: 0 to 1"),
    ("wise_ft", "beta=1", "not a parameter here; allowed: alpha"), ("magnitude", "scope=layer", "allowed: tensor, model"),
    ("random_mask", "soft=3", "is not true or false"), ("merge", "x=1", "allowed: none"),
])
def test_parameters_that_do_not_fit(method, text, says):
    problems = []
    METHODS[method].configured(text, "--parameters", problems)
    assert says in " ".join(problems)


def test_a_value_that_does_not_fit_is_not_called_missing():
    problems = []
    METHODS["wise_ft"].configured("alpha=5", "--parameters", problems)
    assert problems == ["--parameters alpha=5: 5.0 is out of range; allowed: 0 to 1"]


def test_parameters_that_fit():
    problems = []
    assert METHODS["random_mask"].configured("kept=0.4; soft=true", "--parameters", problems) == rows.RandomMask(0.4, True)
    assert RULES["task_arithmetic"].configured("lambda=0.04", "", problems) == rows.TaskArithmetic(0.04)
    assert not problems
