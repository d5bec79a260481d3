"""Alignment of experts: an expert's hidden units in another order compute the same, and can be averaged better.

The order that brings an expert closest to a reference maximises the sum of the products of matched units' weights, over
all weights into and out of a unit (gate, up and down, with biases): a linear assignment (Ainsworth, Hayase, Srinivasa:
Git Re-Basin, 2023; Li et al.: Merge, Then Compress, ICLR 2024, with expert 0 as the reference).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Expert = Mapping[str, Tensor]
"""The weights of one expert by the names of its bank's parameters, without the axis of experts."""


def alignment(reference: Expert, expert: Expert, hidden_axes: Mapping[str, int]) -> Tensor:
    """Return (H,) int64: which unit of ``expert`` takes the place of each unit of ``reference``.

    ``hidden_axes``: see ExpertBank. The same order for equal experts. ``reference``, ``expert``: of any precision; the
    products are fp64.
    """
    ours_HW, theirs_HW = (_units(weights, hidden_axes) for weights in (reference, expert))
    _, order_H = linear_sum_assignment((ours_HW @ theirs_HW.T).numpy(), maximize=True)
    return torch.from_numpy(order_H)


def reordered(weight: Tensor, name: str, order_H: Tensor, hidden_axes: Mapping[str, int]) -> Tensor:
    """Return the parameter ``name`` of one expert with its units in another order, itself if it has no units."""
    return weight.index_select(hidden_axes[name] - 1, order_H) if name in hidden_axes else weight


def _units(weights: Expert, hidden_axes: Mapping[str, int]) -> Tensor:
    """All weights of each unit, (H, W) fp64."""
    parts = [
        w.double().movedim(hidden_axes[name] - 1, 0).flatten(1) if w.dim() > 1 else w.double().unsqueeze(1)
        for name, w in weights.items()
        if name in hidden_axes
    ]
    return torch.cat(parts, dim=1)
