"""Layer normalisation with a scale and a shift of its own for each group of rows.

Every row is normalised in the same way; only the scale and the shift differ by group. So the stacks
are never sliced in autograd, and a group without rows gets a gradient of exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels.device_path import RowCounts, check_counts, ends_of_groups
from dist_moe.kernels.gpu.grouped_gemm import group_sums


def grouped_layer_norm(
    x_ND: Tensor, weight_ED: Tensor, bias_ED: Tensor, eps: float, rows_per_group: RowCounts
) -> Tensor:
    """Normalise rows of group e over their D numbers; return them times ``weight_ED[e]`` plus ``bias_ED[e]``.

    ``x_ND``: (N, D), sorted by group; ``rows_per_group``: E counts, zeros allowed, summing to N; ``eps``: added
    to the variance. Returns (N, D) in the type of ``x_ND``; arithmetic is fp32 at least. Raises ValueError when
    the counts do not fit.
    """
    check_counts(rows_per_group, len(weight_ED), len(x_ND))
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    rows = rows_per_group if isinstance(rows_per_group, Tensor) else torch.tensor(rows_per_group)
    y_ND: Tensor = _GroupedLayerNorm.apply(x_ND.to(wide), weight_ED.to(wide), bias_ED.to(wide), eps, rows)
    return y_ND.to(x_ND.dtype)


def grouped_layer_norm_reference(
    x_ND: Tensor, weight_ED: Tensor, bias_ED: Tensor, eps: float, rows_per_group: list[int]
) -> Tensor:
    """Compute :func:`grouped_layer_norm` in a loop that autograd differentiates by itself."""
    results = []
    for x, weight_D, bias_D in zip(x_ND.split(rows_per_group), weight_ED, bias_ED, strict=True):
        centred = x - x.mean(dim=1, keepdim=True)
        deviation = (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
        results.append(centred / deviation * weight_D + bias_D)
    return torch.cat(results)


class _GroupedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor, bias_ED: Tensor, eps: float, rows_E: Tensor) -> Tensor:
        normal_ND, mean_N1, scale_N1 = torch.native_layer_norm(x_ND, x_ND.shape[1:], None, None, eps)
        group_N = _group_of_each_row(rows_E, len(x_ND))
        ctx.save_for_backward(x_ND, mean_N1, scale_N1, weight_ED, rows_E)
        return normal_ND.mul_(weight_ED[group_N]).add_(bias_ED[group_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mean_N1, scale_N1, weight_ED, rows_E = ctx.saved_tensors
        normal_ND = (x_ND - mean_N1) * scale_N1
        grad_weight, grad_bias = (_sums(rows, rows_E) for rows in (normal_ND.mul_(grad_ND), grad_ND))
        grad_normal_ND = weight_ED[_group_of_each_row(rows_E, len(x_ND))].mul_(grad_ND)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normal_ND, x_ND, x_ND.shape[1:], mean_N1, scale_N1, None, None, [True, False, False]
        )
        return grad_x, grad_weight, grad_bias, None, None


def _group_of_each_row(rows_E: Tensor, num_rows: int) -> Tensor:
    """(N,) int64, without a look at the counts."""
    return torch.searchsorted(rows_E.cumsum(0), torch.arange(num_rows, device=rows_E.device), right=True)


def _sums(rows_ND: Tensor, rows_E: Tensor) -> Tensor:
    return group_sums(rows_ND.contiguous(), ends_of_groups(rows_E))
