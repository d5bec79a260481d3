"""Splits of labelled nodes, edges in both directions, and edges that are rewired."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.graphs.graph import UNLABELLED, Parts
from dist_moe.data.prepared import PARTS
from dist_moe.errors import UserError

TRAIN_PER_CLASS, VAL_NODES, TEST_NODES = 20, 500, 1000
"""Sizes of the splits of Planetoid (Yang et al. 2016)."""


def planetoid_split(label_N: NDArray[np.int64], seed: int) -> Parts:
    """Return 20 nodes of each class to train on, then 500 to validate and 1,000 to test, all at random.

    Raises UserError if there are too few labelled nodes.
    """
    order_N = _shuffled(label_N, seed)
    chosen = [order_N[label_N[order_N] == one][:TRAIN_PER_CLASS] for one in np.unique(label_N[order_N])]
    train = np.concatenate(chosen)
    rest = order_N[~np.isin(order_N, train)]
    if len(rest) < VAL_NODES + TEST_NODES:
        raise UserError(
            f"data.split=planetoid needs {VAL_NODES + TEST_NODES:,} labelled nodes beside those to train on, and there "
            f"are {len(rest):,}; use data.split=random"
        )
    return _sorted(train, rest[:VAL_NODES], rest[VAL_NODES : VAL_NODES + TEST_NODES])


def random_split(label_N: NDArray[np.int64], seed: int) -> Parts:
    """Return 60 % of the labelled nodes to train on, 20 % to validate and 20 % to test, at random."""
    order_N = _shuffled(label_N, seed)
    first, second = round(0.6 * len(order_N)), round(0.8 * len(order_N))
    return _sorted(order_N[:first], order_N[first:second], order_N[second:])


def _shuffled(label_N: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    order_N = np.argsort(np.random.default_rng((seed, 0)).random(len(label_N)), kind="stable")
    labelled: NDArray[np.int64] = order_N[label_N[order_N] != UNLABELLED]
    return labelled


def _sorted(*parts: NDArray[np.int64]) -> Parts:
    return {name: np.sort(nodes) for name, nodes in zip(PARTS, parts, strict=True)}


def undirected_pairs(edge_2E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (2, P) pairs of different nodes that an edge joins, each once, the smaller number first, in order."""
    pair_2E = np.sort(edge_2E[:, edge_2E[0] != edge_2E[1]], axis=0)
    unique: NDArray[np.int64] = np.unique(pair_2E, axis=1)
    return unique


def both_directions(pair_2P: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (2, 2P) edges, each pair there and back."""
    return np.concatenate([pair_2P, pair_2P[::-1]], axis=1)


def rewire(edge_2E: NDArray[np.int64], share: float, num_nodes: int, seed: int) -> NDArray[np.int64]:
    """Return the edges with new targets, drawn uniformly, for a random ``share`` of them. Sources keep their edges.

    The labels know nothing of the new edges: with a growing share a homophilous graph turns into noise.
    """
    rng = np.random.default_rng((seed, 1))
    changed = edge_2E.copy()
    drawn_E = np.argsort(rng.random(edge_2E.shape[1]), kind="stable")[: round(share * edge_2E.shape[1])]
    # Any node but the source itself, uniformly.
    changed[1, drawn_E] = (edge_2E[0, drawn_E] + 1 + rng.integers(0, num_nodes - 1, len(drawn_E))) % num_nodes
    return changed


def homophily(edge_2E: NDArray[np.int64], label_N: NDArray[np.int64]) -> float | None:
    """Return the share of edges between labelled nodes that join nodes of one class; None without such edges."""
    source_E, target_E = label_N[edge_2E]
    both_E = (source_E != UNLABELLED) & (target_E != UNLABELLED)
    return float((source_E == target_E)[both_E].mean()) if both_E.any() else None
