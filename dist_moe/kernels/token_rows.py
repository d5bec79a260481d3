"""Rows of tokens: copy tokens into rows (permute), and add rows up into tokens (un-permute, combine).

    rows of tokens      row[n] = token[token_N[n]]
    weighted scatter    sum[g, t] = sum over n with token_N[n] = t of weight[g, n] * row[n]

As tensor operations these are an index and an ``index_add``, each the other's backward pass; but an
``index_add`` works on one core, and the weighted rows are written and read several times. Here a token's
rows are found through an index that is sorted once, and added up in one pass by as many cores as there
are, as a bag of embeddings; always in the order of the rows, so that results do not depend on the cores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dist_moe.kernels import gpu
from dist_moe.kernels.across_cores import across_cores
from dist_moe.kernels.operands import TokenIndex, on_device_path

BLOCK_BYTES = 256 * 1024
"""Bytes of rows that a pass over several tensors takes at a time, so that they stay in the cache."""

PASSES_OVER_MEMORY = 64
"""A row's product with its token's gradient takes as long as this many multiplications a number in a large
matrix product (measured)."""


def rows_of_tokens(x_TD: Tensor, index: TokenIndex) -> Tensor:
    """Return (N, D) rows of (T, D) tokens. Differentiable, with the same bits every time."""
    return gpu.rows_of_tokens(x_TD, index) if on_device_path(x_TD) else _RowsOfTokens.apply(x_TD, *index)


def rows_of_tokens_reference(x_TD: Tensor, index: TokenIndex) -> Tensor:
    """Compute :func:`rows_of_tokens` by an index that autograd differentiates by itself."""
    return x_TD[index.token_N]


def weighted_scatter(rows_NF: Tensor, weight_GN: Tensor, index: TokenIndex) -> Tensor:
    """Return (G, T, F) sums of (N, F) rows by (G, N) weights, in these' precision; 0 for a token without rows."""
    if on_device_path(rows_NF):
        return gpu.WeightedScatter.apply(rows_NF, weight_GN, *index)
    return _WeightedScatter.apply(rows_NF, weight_GN, *index)


def weighted_scatter_reference(rows_NF: Tensor, weight_GN: Tensor, index: TokenIndex) -> Tensor:
    """Compute :func:`weighted_scatter` by tensor operations that autograd differentiates by itself."""
    zeros_TF = weight_GN.new_zeros(index.num_tokens, rows_NF.shape[1])
    weighted = (rows_NF.to(weight_GN.dtype) * weight_N.unsqueeze(1) for weight_N in weight_GN)
    return torch.stack([zeros_TF.index_add(0, index.token_N, rows) for rows in weighted])


def sums_at(rows_N: Tensor, place_N: Tensor, num_places: int) -> Tensor:
    """Return (P, ...): at each of P places the sum of those of (N, ...) rows that belong there; 0 without any.

    ``place_N``: (N,) int64, the place of each row. Differentiable, with the same bits every time: rows are added in
    their order, where ``index_add`` on a GPU adds those of a place as they come.
    """
    if not on_device_path(rows_N):
        return rows_N.new_zeros(num_places, *rows_N.shape[1:]).index_add(0, place_N, rows_N)
    rows_NF, one_1N = rows_N.unsqueeze(-1).flatten(1), rows_N.new_ones(1, len(rows_N))
    sums_1PF = weighted_scatter(rows_NF, one_1N, TokenIndex.of(place_N, num_places))
    return sums_1PF.view(num_places, *rows_N.shape[1:])


class _RowsOfTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_N: Tensor, start_T1: Tensor) -> Tensor:
        ctx.save_for_backward(row_N, start_T1)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return _sums(grad_ND, *ctx.saved_tensors), None, None, None


class _WeightedScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor, row_N: Tensor, start_T1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_NF, weight_GN, token_N)
        rows_NF = rows_NF.to(weight_GN.dtype)
        return torch.stack([_sums(rows_NF, row_N, start_T1, weight_N[row_N]) for weight_N in weight_GN])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTF: Tensor) -> tuple[Tensor | None, ...]:
        rows_NF, weight_GN, token_N = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            # The gradient of a row: the sum over the gates of its weight times the gradient of its token.
            first_token_G1 = grad_GTF.shape[1] * torch.arange(len(grad_GTF), device=token_N.device).unsqueeze(1)
            token_NG, grad_GTxF = (token_N + first_token_G1).T.contiguous(), grad_GTF.flatten(0, 1).contiguous()
            grad_rows = grad_GTF.new_zeros(0, grad_GTF.shape[2])
            if len(token_N):
                weight_NG = weight_GN.T.contiguous()
                grad_rows = F.embedding_bag(token_NG, grad_GTxF, mode="sum", per_sample_weights=weight_NG)
            grad_rows = grad_rows.to(rows_NF.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _products(grad_GTF, rows_NF, token_N)
        return grad_rows, grad_weight, None, None, None


def _sums(rows_NF: Tensor, row_N: Tensor, start_T1: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """(T, F): per token the sum of its rows, which ``row_N`` names from ``start_T1`` on, each times its weight."""
    if not rows_NF.numel():
        return rows_NF.new_zeros(len(start_T1) - 1, rows_NF.shape[1])
    return F.embedding_bag(
        row_N, rows_NF.contiguous(), start_T1, mode="sum", per_sample_weights=weight_N, include_last_offset=True
    )


def _products(grad_GTF: Tensor, rows_NF: Tensor, token_N: Tensor) -> Tensor:
    """(G, N): the products of each row and its token's gradient."""
    products_GN = grad_GTF.new_empty(len(grad_GTF), len(rows_NF))
    width = max(rows_NF.shape[1], 1)
    size = max(len(rows_NF), 1) if rows_NF.is_cuda else max(BLOCK_BYTES // (width * rows_NF.element_size()), 1)
    blocks = list(zip(rows_NF.split(size), token_N.split(size), products_GN.split(size, dim=1), strict=True))

    def task(block: int, _: Tensor) -> None:
        rows, token, products = blocks[block]
        rows = rows.to(grad_GTF.dtype)
        for grad_TF, products_N in zip(grad_GTF, products, strict=True):
            torch.sum(grad_TF.index_select(0, token).mul_(rows), dim=1, out=products_N)

    rows_per_block = [len(rows) for rows, _, _ in blocks]
    across_cores(task, rows_per_block, PASSES_OVER_MEMORY * width * len(grad_GTF), rows_NF)
    return products_GN
