"""Binary trees as heaps: mass flows from the root to the leaves, densely or only where there is any.

Root 0, children of node q are 2q+1 (left) and 2q+2 (right); n-1 splits, n leaves, any n >= 2. The
leaves from left to right are the nodes of the deepest level followed by the leaves of the level
above it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descend(left_TKQ: Tensor, right_TKQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masses of splits (T, k, n-1) and leaves (T, k, n), given both split probabilities (T, k, n-1).

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


def one_sided_splits(allowed_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (n-1,) bool masks of splits: those that must go left, those that must go right.

    A split must go to one side where the other leads only to leaves that are not in ``allowed_E`` (n,) bool;
    where both do, which no mass can reach, it must go nowhere.
    """
    num_leaves = len(allowed_E)
    leaf_N = torch.arange(num_leaves - 1, 2 * num_leaves - 1, device=allowed_E.device)
    open_N = torch.cat([allowed_E.new_zeros(num_leaves - 1), allowed_E[places_of_leaves(leaf_N, num_leaves)]])
    for _ in range((num_leaves - 1).bit_length()):  # as often as the tree is deep: leaves are heard of at the root
        open_N[: num_leaves - 1] = open_N[1::2] | open_N[2::2]
    left_Q, right_Q = open_N[1::2], open_N[2::2]
    return left_Q & ~right_Q, right_Q & ~left_Q


def places_of_leaves(node_N: Tensor, num_leaves: int) -> Tensor:
    """Return the places from left to right of leaves, given their heap indices."""
    deepest = (1 << ((2 * num_leaves - 1).bit_length() - 1)) - 1
    num_deepest = 2 * num_leaves - 1 - deepest
    return torch.where(node_N >= deepest, node_N - deepest, num_deepest + node_N - (num_leaves - 1))
