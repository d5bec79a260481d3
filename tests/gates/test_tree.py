"""Lazy descent visits exactly the nodes that mass reaches, with the masses of the dense descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.gates.tree import Nodes, descend, descend_lazily
from tests.helpers.oracle import assert_same

TOKENS, TREES = 5, 2


def draw_left(num_leaves: int, share_of_hard: float) -> Tensor:
    torch.manual_seed(num_leaves)
    left_TKQ = torch.rand(TOKENS, TREES, num_leaves - 1, dtype=torch.float64)
    return torch.where(torch.rand_like(left_TKQ) < share_of_hard, left_TKQ.round(), left_TKQ)


@pytest.mark.parametrize("num_leaves", [*range(2, 20), 31, 32, 33])
@pytest.mark.parametrize("share_of_hard", [0.0, 0.5, 1.0])
def test_lazy_descent_visits_the_reached_nodes_and_no_others(num_leaves: int, share_of_hard: float) -> None:
    left_TKQ = draw_left(num_leaves, share_of_hard)
    split_TKQ, leaf_TKE = descend(left_TKQ, 1 - left_TKQ)
    token_N = torch.arange(TOKENS).repeat_interleave(TREES)
    roots = Nodes(
        token_N, torch.arange(TREES).repeat(TOKENS), torch.zeros_like(token_N), torch.ones(len(token_N)).double()
    )

    def probabilities(nodes: Nodes) -> tuple[Tensor, Tensor]:
        left_N = left_TKQ[nodes.token_N, nodes.tree_N, nodes.node_N]
        return left_N, 1 - left_N

    visit = descend_lazily(roots, num_leaves, probabilities)
    for nodes, mass_TKS in ((visit.splits, split_TKQ), (visit.leaves, leaf_TKE)):
        place = (nodes.token_N, nodes.tree_N, nodes.node_N)
        assert len(nodes.node_N) == int((mass_TKS > 0).sum())
        assert_same(torch.zeros_like(mass_TKS).index_put(place, nodes.mass_N), mass_TKS, 0)
    assert_same(visit.left_N, left_TKQ[visit.splits.token_N, visit.splits.tree_N, visit.splits.node_N], 0)


def test_hard_trees_are_visited_in_depth_nodes() -> None:
    left_TKQ = draw_left(64, 1.0)
    token_N = torch.arange(TOKENS).repeat_interleave(TREES)
    roots = Nodes(token_N, torch.arange(TREES).repeat(TOKENS), torch.zeros_like(token_N), torch.ones(len(token_N)))

    def probabilities(nodes: Nodes) -> tuple[Tensor, Tensor]:
        left_N = left_TKQ[nodes.token_N, nodes.tree_N, nodes.node_N]
        return left_N, 1 - left_N

    visit = descend_lazily(roots, 64, probabilities)
    assert len(visit.splits.node_N) == 6 * TOKENS * TREES
    assert len(visit.leaves.node_N) == TOKENS * TREES
