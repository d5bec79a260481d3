"""Alignment of experts: an expert's hidden units in another order compute the same, and can be averaged better.

The order that brings an expert closest to a reference maximises the sum of the products of matched units' weights, over
all weights into and out of a unit (gate, up and down, with biases); or the sum of the correlations of matched units'
activations over tokens. Both are linear assignments (Ainsworth, Hayase, Srinivasa: Git Re-Basin, 2023; Li et al.:
Merge, Then Compress, ICLR 2024, with expert 0 as the reference).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_moe.experts import FeedForwardBank
from dist_moe.parallel import sum_over_ranks

_SAME = 1e-14
"""Product of deviations below which one of two units is the same for all tokens."""

Expert = Mapping[str, Tensor]
"""The weights of one expert by the names of its bank's parameters, without the axis of experts."""


def alignment(reference: Expert, expert: Expert, hidden_axes: Mapping[str, int]) -> Tensor:
    """Return (H,) int64: which unit of ``expert`` takes the place of each unit of ``reference``.

    ``hidden_axes``: see ExpertBank. The same order for equal experts. ``reference``, ``expert``: of any precision; the
    products are fp64.
    """
    ours_HW, theirs_HW = (_units(weights, hidden_axes) for weights in (reference, expert))
    return _matched(ours_HW @ theirs_HW.T)


def alignment_by_activations(reference: Expert, expert: Expert, bank: FeedForwardBank, x_TD: Tensor) -> Tensor:
    """Return (H,) int64: which unit of ``expert`` takes the place of each unit of ``reference``, by their activations.

    ``bank``: one of such experts. ``x_TD``: tokens of this rank, those of all ranks count; a unit that is the same for
    all tokens correlates with none. Collective over all ranks, alike on all.
    """
    units_2TH = torch.stack(
        [bank.hidden_units({n: w.to(x_TD) for n, w in e.items()}, x_TD).double() for e in (reference, expert)]
    )
    ours_TH, theirs_TH = units_2TH
    sums = [units_2TH.sum(1), units_2TH.square().sum(1), ours_TH.T @ theirs_TH, ours_TH.new_tensor(len(x_TD))]
    total = sum_over_ranks(torch.cat([part.flatten() for part in sums])).cpu()
    sum_2H, square_2H, product_HH, count = (
        part.view_as(like) for part, like in zip(total.split([part.numel() for part in sums]), sums, strict=True)
    )
    mean_2H = sum_2H / count
    deviation_2H = (square_2H / count - mean_2H.square()).clamp_min(0).sqrt()
    scale_HH, covariance_HH = torch.outer(*deviation_2H), product_HH / count - torch.outer(*mean_2H)
    correlation_HH = torch.where(scale_HH > _SAME, covariance_HH / scale_HH, 0.0)
    return _matched(correlation_HH)


def reordered(weight: Tensor, name: str, order_H: Tensor, hidden_axes: Mapping[str, int]) -> Tensor:
    """Return the parameter ``name`` of one expert with its units in another order, itself if it has no units."""
    return weight.index_select(hidden_axes[name] - 1, order_H) if name in hidden_axes else weight


def _matched(likeness_HH: Tensor) -> Tensor:
    """The column matched to each row, so that the sum of likenesses is greatest."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(likeness_HH.numpy(), maximize=True)[1])


def _units(weights: Expert, hidden_axes: Mapping[str, int]) -> Tensor:
    """All weights of each unit, (H, W) fp64."""
    parts = [
        w.double().movedim(hidden_axes[name] - 1, 0).flatten(1) if w.dim() > 1 else w.double().unsqueeze(1)
        for name, w in weights.items()
        if name in hidden_axes
    ]
    return torch.cat(parts, dim=1)
