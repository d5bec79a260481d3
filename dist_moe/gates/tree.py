"""Binary trees as heaps: mass flows from the root to the leaves, densely or only where there is any.

Root 0, children of node q are 2q+1 (left) and 2q+2 (right); n-1 splits, n leaves, any n >= 2. The
leaves from left to right are the nodes of the deepest level followed by the leaves of the level
above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def descend(left_TKQ: Tensor, right_TKQ: Tensor) -> tuple[Tensor, Tensor]:
    """Split probabilities (T, k, n-1) -> masses of the splits (T, k, n-1) and leaves (T, k, n).

    Level by level; the nodes of a level, and their children, are contiguous in the heap.
    """
    num_splits = left_TKQ.shape[-1]
    level = torch.ones_like(left_TKQ[..., :1])
    splits, first, leaves_above = [], 0, level[..., :0]
    while first < num_splits:
        inner = min(first + level.shape[-1], num_splits) - first
        parents = level[..., :inner]
        leaves_above = level[..., inner:]
        nodes = slice(first, first + inner)
        splits.append(parents)
        level = torch.stack([parents * left_TKQ[..., nodes], parents * right_TKQ[..., nodes]], dim=-1).flatten(-2)
        first = 2 * first + 1
    return torch.cat(splits, dim=-1), torch.cat([level, leaves_above], dim=-1)


@dataclass(frozen=True)
class Nodes:
    """N visited nodes: of which token, of which tree, which heap index, and the mass that reaches it."""

    token_N: Tensor
    tree_N: Tensor
    node_N: Tensor
    mass_N: Tensor

    def where(self, mask_N: Tensor) -> Nodes:
        return Nodes(self.token_N[mask_N], self.tree_N[mask_N], self.node_N[mask_N], self.mass_N[mask_N])


SplitProbabilities = Callable[[Nodes], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Visit:
    """What a lazy descent saw: the ``splits`` on its way with their ``left_N``, and the ``leaves``,
    whose ``node_N`` is the leaf's place from left to right."""

    splits: Nodes
    left_N: Tensor
    leaves: Nodes


def descend_lazily(roots: Nodes, num_leaves: int, probabilities: SplitProbabilities) -> Visit:
    """Follow every branch of positive mass, a level at a time: O(reached leaves * depth) nodes.

    ``probabilities(nodes)``: (N,) each of going left and of going right from these splits.
    """
    num_splits = num_leaves - 1
    level, splits, lefts, leaves = roots, [], [], []
    for _ in range(num_splits.bit_length()):
        inner_N = level.node_N < num_splits
        leaves.append(level.where(~inner_N))
        splits.append(level.where(inner_N))
        left_N, right_N = probabilities(splits[-1])
        lefts.append(left_N)
        level = _children(splits[-1], left_N, right_N)
    found = concatenate([*leaves, level])
    place_N = _place_of_leaf(found.node_N, num_leaves)
    visited = Nodes(found.token_N, found.tree_N, place_N, found.mass_N)
    return Visit(concatenate(splits), torch.cat(lefts), visited)


def _children(parents: Nodes, left_N: Tensor, right_N: Tensor) -> Nodes:
    both = [
        Nodes(parents.token_N, parents.tree_N, 2 * parents.node_N + side, parents.mass_N * share_N)
        for side, share_N in ((1, left_N), (2, right_N))
    ]
    children = concatenate(both)
    return children.where(children.mass_N > 0)


def concatenate(parts: list[Nodes]) -> Nodes:
    """The nodes of all parts, in order."""
    return Nodes(
        torch.cat([part.token_N for part in parts]),
        torch.cat([part.tree_N for part in parts]),
        torch.cat([part.node_N for part in parts]),
        torch.cat([part.mass_N for part in parts]),
    )


def _place_of_leaf(node_N: Tensor, num_leaves: int) -> Tensor:
    """Heap index of a leaf -> its place from left to right."""
    deepest = (1 << ((2 * num_leaves - 1).bit_length() - 1)) - 1
    num_deepest = 2 * num_leaves - 1 - deepest
    return torch.where(node_N >= deepest, node_N - deepest, num_deepest + node_N - (num_leaves - 1))
