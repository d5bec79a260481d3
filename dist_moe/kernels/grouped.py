"""Linear maps, sparse sums and layer normalisations per group of rows, of weights that autograd never slices.

Slicing a stacked parameter inside autograd makes its backward allocate and add a full stack of
gradients per slice: 4 times slower with 16 groups, 40 times with 64. Here the backward writes
every group's gradient into its place once; a group without rows gets a gradient of exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels import gpu
from dist_moe.kernels.across_cores import across_cores
from dist_moe.kernels.gpu.grouped_gemm import group_sums
from dist_moe.kernels.operands import RowCounts, check_counts, ends_of_groups


def grouped_linear(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None, rows_per_group: RowCounts) -> Tensor:
    """Multiply rows of group e by ``weight_EDF[e]`` and add ``bias_EF[e]``, if there is a bias.

    ``x_ND``: (N, D), sorted by group; ``rows_per_group``: E counts, zeros allowed, summing to N.
    Returns (N, F). A group without rows gets a zero gradient, never none.
    """
    check_counts(rows_per_group, len(weight_EDF), len(x_ND))
    bias_EF = weight_EDF.new_zeros(weight_EDF.shape[::2]) if bias_EF is None else bias_EF
    if torch.is_autocast_enabled(x_ND.device.type) and x_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_EDF, bias_EF = x_ND.to(dtype), weight_EDF.to(dtype), bias_EF.to(dtype)
    if isinstance(rows_per_group, Tensor):
        return gpu.GroupedLinear.apply(x_ND, weight_EDF, bias_EF, ends_of_groups(rows_per_group))
    return _GroupedLinear.apply(x_ND, weight_EDF, bias_EF, rows_per_group)


def grouped_linear_reference(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor, rows_per_group: list[int]) -> Tensor:
    """Compute :func:`grouped_linear` in a loop that autograd differentiates by itself."""
    blocks = x_ND.split(rows_per_group)
    return torch.cat([x @ w + b for x, w, b in zip(blocks, weight_EDF, bias_EF, strict=True)])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor, rows_per_group: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EDF)
        ctx.rows_per_group = rows_per_group
        y_NF = x_ND.new_empty(len(x_ND), weight_EDF.shape[2])
        x, y = x_ND.split(rows_per_group), y_NF.split(rows_per_group)

        def task(e: int, _: Tensor) -> None:
            if len(x[e]):
                torch.addmm(bias_EF[e], x[e], weight_EDF[e], out=y[e])

        across_cores(task, rows_per_group, weight_EDF[0].numel(), x_ND)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, weight_EDF = ctx.saved_tensors
        grad_x = torch.empty_like(x_ND)
        grad_weight = torch.empty_like(weight_EDF)
        grad_bias = weight_EDF.new_empty(weight_EDF.shape[0], weight_EDF.shape[2])
        x, grad, out = (rows.split(ctx.rows_per_group) for rows in (x_ND, grad_NF, grad_x))

        def task(e: int, _: Tensor) -> None:
            torch.mm(x[e].t(), grad[e], out=grad_weight[e])
            torch.sum(grad[e], dim=0, out=grad_bias[e])
            if len(grad[e]):
                torch.mm(grad[e], weight_EDF[e].t(), out=out[e])

        across_cores(task, ctx.rows_per_group, 2 * weight_EDF[0].numel(), x_ND)
        return grad_x, grad_weight, grad_bias, None


def grouped_index_add(y_NF: Tensor, x_NQ: Tensor, column_EQ: Tensor, rows_per_group: RowCounts) -> Tensor:
    """Add number q of a row of group e of ``x_NQ`` to number ``column_EQ[e, q]`` of the same row of ``y_NF``.

    ``y_NF``: written over, if the counts are on the host. ``x_NQ``: of its type. ``column_EQ``: integers; what has a
    negative one is added nowhere and has a gradient of exactly 0. ``rows_per_group``: see :func:`grouped_linear`.
    """
    check_counts(rows_per_group, len(column_EQ), len(x_NQ))
    column_EQ = column_EQ.long()
    if isinstance(rows_per_group, Tensor):
        column_NQ = column_EQ[group_of_each_row(rows_per_group, len(x_NQ))]
        return y_NF.scatter_add(1, column_NQ.clamp(min=0), x_NQ.masked_fill(column_NQ < 0, 0))
    result: Tensor = _GroupedIndexAdd.apply(y_NF, x_NQ, column_EQ, rows_per_group)
    return result


class _GroupedIndexAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NF: Tensor, x_NQ: Tensor, column_EQ: Tensor, rows_per_group: list[int]) -> Tensor:
        ctx.save_for_backward(column_EQ)
        ctx.rows_per_group = rows_per_group
        ctx.mark_dirty(y_NF)
        for y, x, column_Q in zip(y_NF.split(rows_per_group), x_NQ.split(rows_per_group), column_EQ, strict=True):
            there_Q = column_Q >= 0
            if len(x) and there_Q.all():
                y.index_add_(1, column_Q, x)
            elif len(x):
                y.index_add_(1, column_Q[there_Q], x[:, there_Q])
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        (column_EQ,) = ctx.saved_tensors
        grad_x = grad_NF.new_empty(len(grad_NF), column_EQ.shape[1])
        groups = (rows.split(ctx.rows_per_group) for rows in (grad_NF, grad_x))
        for grad, out, column_Q in zip(*groups, column_EQ, strict=True):
            torch.index_select(grad, 1, column_Q.clamp(min=0), out=out)
            out[:, column_Q < 0] = 0
        return grad_NF, grad_x, None, None


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
    rows = torch.as_tensor(rows_per_group, device=x_ND.device)
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
        group_N = group_of_each_row(rows_E, len(x_ND))
        ctx.save_for_backward(x_ND, mean_N1, scale_N1, weight_ED, rows_E)
        return normal_ND.mul_(weight_ED[group_N]).add_(bias_ED[group_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mean_N1, scale_N1, weight_ED, rows_E = ctx.saved_tensors
        normal_ND = (x_ND - mean_N1) * scale_N1
        grad_weight, grad_bias = (
            group_sums(rows.contiguous(), ends_of_groups(rows_E)) for rows in (normal_ND.mul_(grad_ND), grad_ND)
        )
        grad_normal_ND = weight_ED[group_of_each_row(rows_E, len(x_ND))].mul_(grad_ND)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normal_ND, x_ND, x_ND.shape[1:], mean_N1, scale_N1, None, None, [True, False, False]
        )
        return grad_x, grad_weight, grad_bias, None, None


def group_of_each_row(rows_E: Tensor, num_rows: int) -> Tensor:
    """Return (N,) int64: the group of each of N rows sorted by group; their counts (E,) are not looked at."""
    return torch.searchsorted(rows_E.cumsum(0), torch.arange(num_rows, device=rows_E.device), right=True)
