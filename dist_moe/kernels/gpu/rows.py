"""Permute and weighted un-permute on an accelerator, each one pass over the rows, forward and backward.

Every token adds its own rows in the order of their experts: no atomics, no waiting, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels.gpu.grouped_gemm import on_triton, triton_runs
from dist_moe.kernels.operands import TokenIndex


def rows_of_tokens(x_TD: Tensor, index: TokenIndex) -> Tensor:
    """Return (N, D): row n is ``x_TD[token_N[n]]``, under autocast in its type already. Differentiable."""
    device = x_TD.device.type
    lower = torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lower else x_TD.dtype
    return _RowsOfTokens.apply(x_TD, *index, dtype)


class _RowsOfTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_N: Tensor, start_T1: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(row_N, start_T1)
        ctx.dtype = x_TD.dtype
        return _gather(x_TD, token_N, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None]:
        row_N, start_T1 = ctx.saved_tensors
        one_1N = grad_ND.new_ones(1, 1, dtype=torch.float32).expand(1, grad_ND.shape[0])
        grad_1TD = _token_sums(grad_ND, one_1N, row_N, start_T1, ctx.dtype)
        return grad_1TD.squeeze(0), None, None, None, None


class WeightedScatter(torch.autograd.Function):
    """:func:`dist_moe.kernels.weighted_scatter` of rows, weights and index: (G, T, F) in the weights' precision."""

    @staticmethod
    def forward(
        ctx: Any, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor, row_N: Tensor, start_T1: Tensor
    ) -> Tensor:
        """Return each token's sum of its weighted rows, in the order of the rows."""
        ctx.save_for_backward(rows_NF, weight_GN, token_N)
        return _token_sums(rows_NF, weight_GN, row_N, start_T1, weight_GN.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTF: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of rows and weights."""
        rows_NF, weight_GN, token_N = ctx.saved_tensors
        grad_rows, grad_weight = _token_sums_backward(grad_GTF, rows_NF, weight_GN, token_N)
        return grad_rows, grad_weight, None, None, None


@torch.library.custom_op("dist_moe::gather_rows", mutates_args=())
def _gather(x_TD: Tensor, token_N: Tensor, dtype: torch.dtype) -> Tensor:
    if triton_runs(x_TD):
        return on_triton("triton_rows", "gather", x_TD, token_N, dtype)
    return x_TD.index_select(0, token_N).to(dtype)


@_gather.register_fake
def _(x_TD: Tensor, token_N: Tensor, dtype: torch.dtype) -> Tensor:
    return x_TD.new_empty(token_N.shape[0], x_TD.shape[1], dtype=dtype)


@torch.library.custom_op("dist_moe::token_sums", mutates_args=())
def _token_sums(rows_NF: Tensor, weight_GN: Tensor, by_token_N: Tensor, start_T1: Tensor, dtype: torch.dtype) -> Tensor:
    if triton_runs(rows_NF):
        return on_triton("triton_rows", "token_sums", rows_NF, weight_GN, by_token_N, start_T1, dtype)
    tokens = start_T1.shape[0] - 1
    token_N = torch.arange(tokens).repeat_interleave(start_T1.diff())
    total = torch.float64 if dtype == torch.float64 else torch.float32
    weighted_GNF = weight_GN[:, by_token_N, None].to(total) * rows_NF[by_token_N].to(total)
    zeros_GTF = weighted_GNF.new_zeros(len(weight_GN), tokens, rows_NF.shape[1])
    return zeros_GTF.index_add(1, token_N, weighted_GNF).to(dtype)


@_token_sums.register_fake
def _(rows_NF: Tensor, weight_GN: Tensor, by_token_N: Tensor, start_T1: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_NF.new_empty(weight_GN.shape[0], start_T1.shape[0] - 1, rows_NF.shape[1], dtype=dtype)


@torch.library.custom_op("dist_moe::token_sums_backward", mutates_args=())
def _token_sums_backward(
    grad_GTF: Tensor, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    if triton_runs(rows_NF):
        return on_triton("triton_rows", "token_sums_backward", grad_GTF, rows_NF, weight_GN, token_N)
    grad_GNF = grad_GTF[:, token_N]
    grad_weight_GN = (grad_GNF * rows_NF.to(grad_GNF.dtype)).sum(dim=2)
    grad_rows_NF = (grad_GNF * weight_GN.unsqueeze(2)).sum(dim=0)
    return grad_rows_NF.to(rows_NF.dtype), grad_weight_GN.to(weight_GN.dtype)


@_token_sums_backward.register_fake
def _(grad_GTF: Tensor, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    return rows_NF.new_empty(rows_NF.shape), weight_GN.new_empty(weight_GN.shape)
