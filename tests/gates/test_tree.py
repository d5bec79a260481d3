"""Lazy descent visits exactly the nodes that mass reaches, with the masses and gradients of the dense descent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_moe.gates.lazy_tree import DENSE_LEVELS, Visit, descend_lazily, roots_of
from dist_moe.gates.tree import descend
from dist_moe.kernels import Band, Pairs, select
from tests.helpers.oracle import assert_same

TOKENS, TREES = 5, 2


def draw_left(num_leaves: int, share_of_hard: float) -> Tensor:
    torch.manual_seed(num_leaves)
    left_TKQ = torch.rand(TOKENS, TREES, num_leaves - 1, dtype=torch.float64)
    return torch.where(torch.rand_like(left_TKQ) < share_of_hard, left_TKQ.round(), left_TKQ)


def visit_of(left_TKQ: Tensor, gain: int = 0) -> Visit | None:
    left_KTQ = left_TKQ.detach().transpose(0, 1).contiguous()

    def products(pairs: Pairs, band: Band) -> Tensor:
        assert bool(((pairs.row_N >= band.first) & (pairs.row_N < band.last)).all())
        return select(left_KTQ, pairs, 0)

    def split(t_N: Tensor) -> tuple[Tensor, Tensor]:
        return t_N, 1 - t_N

    num_tokens, num_trees, num_splits = left_TKQ.shape
    return descend_lazily(roots_of(num_tokens, num_trees, left_TKQ), num_splits + 1, products, split, gain)


@pytest.mark.parametrize("num_leaves", [*range(2, 20), 31, 32, 33, 64, 100])
@pytest.mark.parametrize("share_of_hard", [0.0, 0.5, 1.0])
def test_lazy_descent_visits_the_reached_nodes_and_no_others(num_leaves: int, share_of_hard: float) -> None:
    left_TKQ = draw_left(num_leaves, share_of_hard)
    split_TKQ, leaf_TKE = descend(left_TKQ, 1 - left_TKQ)
    visit = visit_of(left_TKQ)
    assert visit is not None
    for nodes, mass_TKS in ((visit.splits, split_TKQ), (visit.leaves, leaf_TKE)):
        place = (nodes.token_N, nodes.tree_N, nodes.node_N)
        assert len(nodes.node_N) == int((mass_TKS > 0).sum())
        assert_same(torch.zeros_like(mass_TKS).index_put(place, nodes.mass_N), mass_TKS, 0)
    left_N = torch.cat([level.left_N for level in visit.levels])
    assert_same(left_N, left_TKQ[visit.splits.token_N, visit.splits.tree_N, visit.splits.node_N], 0)


@pytest.mark.parametrize("num_leaves", [2, 3, 5, 8, 13, 33, 100])
@pytest.mark.parametrize("share_of_hard", [0.0, 0.5, 1.0])
def test_gradients_of_masses_equal_those_of_the_dense_descent(num_leaves: int, share_of_hard: float) -> None:
    left_TKQ = draw_left(num_leaves, share_of_hard).requires_grad_()
    weights = [torch.rand(TOKENS, TREES, width, dtype=torch.float64) for width in (num_leaves - 1, num_leaves)]
    dense = descend(left_TKQ, 1 - left_TKQ)
    (expected_TKQ,) = torch.autograd.grad(sum((m * w).sum() for m, w in zip(dense, weights, strict=True)), left_TKQ)
    visit = visit_of(left_TKQ)
    assert visit is not None
    pairs, t_F, bands = visit.fractional()
    left_F = left_TKQ[pairs.token_N, pairs.stack_N, pairs.row_N]
    assert_same(t_F, left_F, 0)
    for place, band in zip(torch.split(pairs.row_N, [band.count for band in bands]), bands, strict=True):
        assert bool(((place >= band.first) & (place < band.last)).all())
    masses = visit.masses(left_F, 1 - left_F)
    places = [(nodes.token_N, nodes.tree_N, nodes.node_N) for nodes in (visit.splits, visit.leaves)]
    loss = sum((m * w[place]).sum() for m, w, place in zip(masses, weights, places, strict=True))
    (actual_TKQ,) = torch.autograd.grad(loss, left_TKQ)
    fractional = (left_TKQ > 0) & (left_TKQ < 1)
    assert_same(actual_TKQ, torch.where(fractional, expected_TKQ, 0), 1e-13)


def test_mass_that_underflows_is_not_followed() -> None:
    left_TKQ = torch.full((1, 1, 7), 1e-200, dtype=torch.float64)
    visit = visit_of(left_TKQ)
    assert visit is not None
    leaf_E = descend(left_TKQ, 1 - left_TKQ)[1].flatten()
    assert 0 < int((leaf_E > 0).sum()) < 8
    assert sorted(visit.leaves.node_N.tolist()) == leaf_E.nonzero().flatten().tolist()
    pairs, t_F, _ = visit.fractional()
    shares = (t_F.requires_grad_(), (1 - t_F).detach().requires_grad_())
    grads = torch.autograd.grad(visit.masses(*shares)[1].sum(), shares)
    reached = {int(node): place for place, node in enumerate(pairs.row_N)}
    assert (grads[0][reached[2]], grads[1][reached[2]]) == (1, 1)  # right of the root: both children have mass
    assert (grads[0][reached[1]], grads[1][reached[1]]) == (0, 1e-200)  # left of it: the left child has none


@pytest.mark.parametrize("num_leaves", [64, 1024, 4096])
def test_hard_trees_are_visited_in_depth_nodes(num_leaves: int) -> None:
    """k log n: one split a level, one leaf, for every token and tree."""
    visit = visit_of(draw_left(num_leaves, 1.0))
    assert visit is not None
    assert len(visit.splits) == math.log2(num_leaves) * TOKENS * TREES
    assert len(visit.leaves) == TOKENS * TREES
    assert len(visit.fractional()[1]) == 0


def test_descent_gives_up_where_much_is_reached() -> None:
    below = 2 ** (DENSE_LEVELS + 2)
    assert visit_of(draw_left(below, 0.0), gain=2) is None
    assert visit_of(draw_left(below, 1.0), gain=2) is not None
    assert visit_of(draw_left(2**DENSE_LEVELS, 0.0), gain=2) is not None
