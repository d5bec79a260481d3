"""Binary trees as heaps: mass flows from the root to the leaves, densely or only where there is any.

Root 0, children of node q are 2q+1 (left) and 2q+2 (right); n-1 splits, n leaves, any n >= 2. The
leaves from left to right are the nodes of the deepest level followed by the leaves of the level
above it.
"""

from __future__ import annotations

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


def places_of_leaves(node_N: Tensor, num_leaves: int) -> Tensor:
    """Heap index of a leaf -> its place from left to right."""
    deepest = (1 << ((2 * num_leaves - 1).bit_length() - 1)) - 1
    num_deepest = 2 * num_leaves - 1 - deepest
    return torch.where(node_N >= deepest, node_N - deepest, num_deepest + node_N - (num_leaves - 1))
