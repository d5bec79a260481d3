"""Weighted sums of rows into tokens, for several gates at once: the arithmetic of combine.

The plain form writes and reads every weighted row several times. Here rows are taken in blocks
that stay in the cache while all gates use them, forward and backward; on a GPU, in one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels import gpu
from dist_moe.kernels.device_path import on_device_path

BLOCK_BYTES = 256 * 1024


def weighted_scatter(rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """out[g, t] = sum over n with ``token_N[n]`` = t of ``weight_GN[g, n]`` * ``rows_NF[n]``.

    Returns (G, T, F) in the precision of the weights, zero for a token without rows.
    """
    if on_device_path(rows_NF):
        return gpu.weighted_scatter(rows_NF, weight_GN, token_N, num_tokens)
    return _WeightedScatter.apply(rows_NF, weight_GN, token_N, num_tokens)


def weighted_scatter_reference(rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """The same, as tensor operations that autograd differentiates by itself."""
    zeros_TF = weight_GN.new_zeros(num_tokens, rows_NF.shape[1])
    weighted = (rows_NF.to(weight_GN.dtype) * weight_N.unsqueeze(1) for weight_N in weight_GN)
    return torch.stack([zeros_TF.index_add(0, token_N, rows) for rows in weighted])


class _WeightedScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(rows_NF, weight_GN, token_N)
        sums_GTF = weight_GN.new_zeros(len(weight_GN), num_tokens, rows_NF.shape[1])
        for block in _blocks(rows_NF):
            rows = rows_NF[block].to(weight_GN.dtype)
            for weight_N, sums_TF in zip(weight_GN, sums_GTF, strict=True):
                sums_TF.index_add_(0, token_N[block], rows * weight_N[block].unsqueeze(1))
        return sums_GTF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_NF, weight_GN, token_N = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows_NF), torch.empty_like(weight_GN)
        for block in _blocks(rows_NF):
            rows = rows_NF[block].to(weight_GN.dtype)
            total = torch.zeros_like(rows)
            for g, grad_TF in enumerate(grad_GTF):
                grad = grad_TF.index_select(0, token_N[block])
                torch.sum(grad * rows, dim=1, out=grad_weight[g, block])
                total.addcmul_(grad, weight_GN[g, block].unsqueeze(1))
            grad_rows[block] = total
        return grad_rows, grad_weight, None, None


def _blocks(rows_NF: Tensor) -> Iterator[slice]:
    count = len(rows_NF)
    row_bytes = max(rows_NF.shape[1] * rows_NF.element_size(), 1)
    size = max(count, 1) if rows_NF.is_cuda else max(BLOCK_BYTES // row_bytes, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
