"""Permute: the rows of tokens, one for each of their experts."""

from __future__ import annotations

from torch import Tensor

from dist_moe.kernels import gpu
from dist_moe.kernels.device_path import on_device_path


def gather_rows(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """(N, D): row n is ``x_TD[token_N[n]]``. Differentiable; on an accelerator with the same bits every time."""
    return gpu.gather_rows(x_TD, token_N) if on_device_path(x_TD) else gather_rows_reference(x_TD, token_N)


def gather_rows_reference(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """The same, as an index that autograd differentiates by itself."""
    return x_TD[token_N]
