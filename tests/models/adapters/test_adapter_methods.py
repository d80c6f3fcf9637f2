"""Ways to fuse adapters, against short references on dense matrices and by hand: exact, and functions of B A alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from models.adapters import merges as adapter_merges
from models.adapters.fuse import _draw
from models.adapters.merges import concatenate, lego
from models.adapters.methods import ADAPTER_METHODS, Cat, Knots, Rank, RankOrEnergy, Sparse, Tsv
from models.operators.core_space import cut, project
from models.operators.election import elect
from models.operators.low_rank import pick_rank
from models.operators.selection import trim

OUT, IN = 40, 30
PARAMETERS = {"svd": RankOrEnergy(), "linear": RankOrEnergy(), "ties": Sparse(density=0.3),
              "dare_linear": Sparse(density=0.5),
              "dare_ties": Sparse(density=0.5), "magnitude_prune": Sparse(density=0.3), "knots": Knots(density=0.3),
              "tsv": Tsv(), "isotropic": Rank()}
draw = partial(_draw, 0, "layer")


def make(*ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(r, IN, generator=generator), torch.randn(OUT, r, generator=generator) * (i + 1))
            for i, r in enumerate(ranks)]


def dense(pair):
    a, b = (part.double() for part in pair)
    return b @ a


def fused(name, pairs, weights, parameters=None, rank=99):
    """A method of the table, carried through its space and back; dense, fp64."""
    row, p = ADAPTER_METHODS[name], parameters or PARAMETERS[name]
    core = project(pairs, getattr(p, "space", row.space))
    merged = row.load()(core.tasks, weights, p, draw)
    return merged.double() if core.left is None else dense(cut(core, merged, rank).pair)


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one.double(), two.double(), rtol=0, atol=tolerance * float(two.norm()))


@pytest.mark.parametrize("space", ["core", "left", "dense"])
def test_a_space_holds_the_changes_without_loss(space):
    pairs = make(3, 5, 2)
    core = project(pairs, space)
    for task, pair in zip(core.tasks, pairs, strict=True):
        back = task.double() if core.left is None else core.left @ task
        back = back if core.right is None else back @ core.right.T
        close(back, dense(pair), 1e-6)
    for axes in (core.left, core.right):
        if axes is not None:
            close(axes.T @ axes, torch.eye(axes.shape[1]), 1e-12)
    assert core.tasks[0].shape == {"core": (10, 10), "left": (10, IN), "dense": (OUT, IN)}[space]


def test_more_ranks_than_the_matrix_has_rows():
    torch.manual_seed(0)
    pairs = [(torch.randn(5, IN), torch.randn(6, 5)) for _ in range(2)]
    close(fused("svd", pairs, (0.6, 0.4)), 0.6 * dense(pairs[0]) + 0.4 * dense(pairs[1]), 1e-6)
    assert fused("ties", pairs, (0.6, 0.4)).shape == (6, IN)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_fusion_depends_on_the_changes_and_not_on_their_factors(name):
    pairs, weights = make(3, 4), (0.7, 0.5)
    generator = torch.Generator().manual_seed(9)
    mixed = []
    for a, b in pairs:
        mix = torch.randn(len(a), len(a), generator=generator) + 3 * torch.eye(len(a))
        mixed.append((torch.linalg.solve(mix, a), b @ mix))
    padded = [(torch.cat([a, torch.zeros(2, IN)]), torch.cat([b, torch.ones(OUT, 2)], 1)) for a, b in pairs]
    want = fused(name, pairs, weights)
    close(fused(name, mixed, weights), want, 1e-4)
    close(fused(name, padded, weights), want, 1e-4)


@pytest.mark.parametrize("name", [n for n in PARAMETERS if not n.startswith("dare")])
def test_the_order_of_the_adapters_does_not_matter(name):
    pairs = make(3, 4)
    close(fused(name, pairs[::-1], (0.5, 0.7)), fused(name, pairs, (0.7, 0.5)))


@pytest.mark.parametrize("name", ["svd", "linear"])
def test_the_weighted_sum_is_exact_and_its_cut_optimal(name):
    pairs, weights = make(3, 4), (0.7, -1.5)
    want = sum(w * dense(pair) for w, pair in zip(weights, pairs, strict=True))
    close(fused(name, pairs, weights), want, 1e-6)
    u, values, vh = torch.linalg.svd(want)
    close(fused(name, pairs, weights, rank=2), u[:, :2] * values[:2] @ vh[:2], 1e-6)


def test_cut_reports_what_it_cut():
    core = project(make(3, 4), "core")
    merged = sum(core.tasks)
    values = torch.linalg.svdvals(merged)
    done = cut(core, merged, 4)
    assert done.norm == pytest.approx(float(merged.norm()))
    assert done.error == pytest.approx(float(values[4:].norm() / values.norm()))
    assert cut(core, merged, 99).error < 1e-6
    assert done.pair[0].shape == (4, IN)
    torch.testing.assert_close(done.pair[0].norm(dim=1), done.pair[1].norm(dim=0))


def test_ranks_by_size_and_energy():
    values = torch.tensor([3.0, 2.0, 1.0, 1e-9])
    assert [pick_rank(values, r) for r in (1, 2, 99)] == [1, 2, 3]
    assert [pick_rank(values, 99, e) for e in (0.5, 0.64, 0.65, 0.93, 0.99)] == [1, 1, 2, 3, 3]
    assert pick_rank(torch.zeros(3), 2) == 1


def test_trim_keeps_exactly_k_and_the_first_of_equals():
    task = torch.tensor([[1.0, -3.0, 2.0], [2.0, 0.5, -2.0]])
    assert trim(task, 0.5).tolist() == [[0, -3, 2], [2, 0, 0]]
    assert trim(task, 1.0).tolist() == task.tolist()
    assert int((trim(task, 0.01) != 0).sum()) == 1


def test_election_by_hand():
    """Signed: [3, -1, 2, 0], [-1, -2, -2, 4]: sums +, -, 0 (counts as +), +."""
    one, two = torch.tensor([6.0, -2.0, 4.0, 0.0]), torch.tensor([-2.0, -4.0, -4.0, 8.0])
    assert elect([one, two], (0.5, 0.5)).tolist() == [6, -3, 4, 8]
    # weights 3:1 -> signed [18, -6, 12, 0], [-2, -4, -4, 8]; the second entry is (-6 - 4) / 4
    assert elect([one, two], (3.0, 1.0)).tolist() == [6, -2.5, 4, 8]
    assert elect([one, two], (1.0, -1.0)).tolist() == [4, 4, 4, -8]


def test_dense_ties_is_ties_on_the_dense_changes():
    pairs, weights = make(3, 4), (0.6, 0.4)
    kept = []
    for pair in pairs:
        change = (pair[1] @ pair[0]).flatten()
        order = change.abs().argsort(descending=True, stable=True)[: int(0.3 * change.numel())]
        kept.append(torch.zeros_like(change).index_put((order,), change[order]).view(OUT, IN))
    total = sum(w * k for w, k in zip(weights, kept, strict=True))
    merged, share = torch.zeros(OUT, IN), torch.zeros(OUT, IN)
    for w, k in zip(weights, kept, strict=True):
        agrees = (k * torch.where(total < 0, -1, 1)) > 0
        merged, share = merged + w * k * agrees, share + w * agrees
    close(fused("ties", pairs, weights, Sparse(density=0.3, space="dense")), merged / share.clamp_min(1e-9))


def test_knots_is_ties_on_the_right_blocks_of_the_joint_svd():
    pairs, weights = make(3, 4), (0.6, 0.4)
    u, values, vh = torch.linalg.svd(torch.cat([dense(p) for p in pairs], 1), full_matrices=False)
    u, blocks = u[:, :7], (values[:7, None] * vh[:7]).split(IN, 1)
    close(fused("knots", pairs, weights), u @ elect([trim(block, 0.3) for block in blocks], weights))


def test_dare_is_unbiased_and_its_masks_follow_adapter_module_and_seed():
    pairs, p = make(3, 4), Sparse(density=0.5)
    core = project(pairs, "core")
    want = 0.6 * core.tasks[0] + 0.4 * core.tasks[1]
    runs = [adapter_merges.dare_linear(core.tasks, (0.6, 0.4), p, partial(_draw, seed, "m")) for seed in range(400)]
    spread = torch.stack(runs).std(0) / 20
    assert ((torch.stack(runs).mean(0) - want).abs() <= 4.5 * spread + 1e-12).all()
    shape = (50, 50)
    masks = [_draw(s, m, i, shape) for s, m, i in ((0, "m", 0), (1, "m", 0), (0, "n", 0), (0, "m", 1))]
    assert all(abs(float((masks[0] - other).mean())) < 0.05 for other in masks[1:])
    assert all(abs(float(torch.corrcoef(torch.stack([masks[0].flatten(), m.flatten()]))[0, 1])) < 0.06 for m in masks[1:])
    assert torch.equal(masks[0], _draw(0, "m", 0, shape))


def test_pruning_by_magnitude_is_trim_then_sum():
    pairs, weights = make(3, 4), (2.0, -1.0)
    core = project(pairs, "core")
    close(fused("magnitude_prune", pairs, weights),
          core.left @ (2 * trim(core.tasks[0], 0.3) - trim(core.tasks[1], 0.3)) @ core.right.T)


def test_tsv_against_the_papers_algorithm_on_dense_matrices():
    pairs, weights = make(4, 4), (0.6, 0.4)
    lefts, values, rights = zip(*[(u[:, :2], w * s[:2], vh[:2].T) for w, pair in zip(weights, pairs, strict=True)
                                  for u, s, vh in [torch.linalg.svd(dense(pair), full_matrices=False)]], strict=True)
    sides = []
    for side in (lefts, rights):
        p, _, q = torch.linalg.svd(torch.cat(side, 1), full_matrices=False)
        sides.append(p @ q)
    close(fused("tsv", pairs, weights), sides[0] * torch.cat(values) @ sides[1].T)


def test_tsv_leaves_tasks_that_do_not_interfere_as_they_are():
    a, b = torch.linalg.qr(torch.randn(IN, 4)).Q.T, torch.linalg.qr(torch.randn(OUT, 4)).Q
    pairs = [(a[:2], b[:, :2]), (a[2:], b[:, 2:] * 3)]
    close(fused("tsv", pairs, (1.0, 0.5), Tsv(density=1.0)), dense(pairs[0]) + 0.5 * dense(pairs[1]))


def test_isotropic_evens_the_singular_values_of_the_sum():
    pairs, weights = make(3, 4), (0.6, 0.4)
    u, values, vh = torch.linalg.svd(0.6 * dense(pairs[0]) + 0.4 * dense(pairs[1]), full_matrices=False)
    close(fused("isotropic", pairs, weights), values[:7].mean() * u[:, :7] @ vh[:7])
    close(fused("isotropic", pairs, weights, Rank(rank=2)), values[:2].mean() * u[:, :2] @ vh[:2])


def test_lego_of_equal_adapters_is_the_adapter():
    (pair,) = make(4)
    shuffled = (pair[0][[2, 0, 3, 1]] * 2, pair[1][:, [2, 0, 3, 1]] / 2)
    close(dense(lego([pair, shuffled], (0.5, 0.5), Rank(), draw)), dense(pair))
    close(dense(lego([pair, shuffled], (1.0, 1.0), Rank(), draw)), 2 * dense(pair))


def test_lego_finds_the_shared_units_and_scales_by_rank():
    (first, second), (shared,) = make(3, 3), make(2, seed=5)
    pairs = [(torch.cat([shared[0], a[:1]]), torch.cat([shared[1], b[:, :1]], 1)) for a, b in (first, second)]
    merged = dense(lego(pairs, (0.5, 0.5), Rank(rank=4), draw))
    units = dense(shared) + dense((first[0][:1], first[1][:, :1])) + dense((second[0][:1], second[1][:, :1]))
    close(merged, (3 / 4) ** 0.5 * units)
    one = lego(pairs, (1.0, 0.0), Rank(rank=3), draw)
    close(dense(one), dense(pairs[0]))


def test_concatenation_by_hand():
    a, b = concatenate([(torch.ones(1, 2), torch.full((2, 1), 2.0)), (torch.eye(2), torch.eye(2))], (0.5, -1.0), Cat(), draw)
    assert (b @ a).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_untrained_adapter_is_no_problem(name):
    empty = (torch.randn(2, IN), torch.zeros(OUT, 2))
    assert fused(name, [empty, empty], (0.5, 0.5)).abs().max() == 0
    assert torch.isfinite(fused(name, [empty, *make(3)], (0.5, 0.5))).all()
    assert torch.isfinite(dense(lego([empty, empty], (0.5, 0.5), Rank(), draw))).all()
