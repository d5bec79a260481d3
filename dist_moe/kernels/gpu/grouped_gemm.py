"""Products of ragged groups of rows on an accelerator: torch's ``grouped_mm`` where it is good, else Triton.

``torch.nn.functional.grouped_mm`` has a kernel for bf16 on compute capability 9 and 10 only, for strides that
are multiples of 16 bytes, and for fewer than 1,024 groups. For another type or strides it copies the offsets to the
host and loops. Its gradient of the weights of a group without rows is not 0 on capability 10 (pytorch/pytorch, issue
172439), and it adds no bias. There Triton computes. On a CPU, where the path runs in tests only, so does a plain
loop, the reference.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT_BYTES = 16
MOST_GROUPS = 1023
"""``grouped_mm`` refuses more."""


def products(x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    """Return rows of group e times ``weight_EDF[e]`` plus ``bias_EF[e]``: (N, F), in the type of ``x_ND``.

    ``x_ND``: (N, D), sorted by group. ``ends_E``: (E,) int32, the row after the last of each group, the last
    being N. ``weight_EDF``: (E, D, F), of any strides, in the type of ``x_ND``. Sums are fp32, or fp64 for fp64.
    """
    if bias_EF is None and _takes(ends_E, x_ND, weight_EDF) and _capability(x_ND.device) in (9, 10):
        return F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
    return _products(x_ND, weight_EDF, bias_EF, ends_E)


def outer_sums(x_ND: Tensor, grad_NF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, D, F): of each group the sum over its rows of x^T grad, exactly 0 without rows."""
    if _takes(ends_E, x_ND, grad_NF) and _capability(x_ND.device) == 9:
        return F.grouped_mm(x_ND.t(), grad_NF, offs=ends_E)
    return _outer_sums(x_ND, grad_NF, ends_E)


def triton_runs(x: Tensor) -> bool:
    """Return whether Triton computes on tensors like ``x``: on a GPU, or as its interpreter on a CPU."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def on_triton(module: str, kernel: str, *operands: Any) -> Any:
    """Launch ``kernel`` of ``module`` of this folder, imported only here: builds of torch for CPUs have no Triton."""
    with torch.cuda.device_of(operands[0]):
        return getattr(import_module(f"{__package__}.{module}"), kernel)(*operands)


def _takes(ends_E: Tensor, *factors: Tensor) -> bool:
    """Whether ``grouped_mm`` computes these without waiting, on a GPU that it knows."""
    return ends_E.shape[0] <= MOST_GROUPS and all(_on_gpu(x) and _suits(x) for x in factors)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _suits(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() > 0 and _aligned(x)


def _aligned(x: Tensor) -> bool:
    strides = sorted(x.stride())
    return strides[0] == 1 and all(stride * x.element_size() % ALIGNMENT_BYTES == 0 for stride in strides[1:])


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# A constant in compiled code. torch.compiler.assume_constant_result sets this too, but imports torch._dynamo: 2 s.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("dist_moe::group_products", mutates_args=())
def _products(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    if triton_runs(x_ND):
        return on_triton("triton_gemm", "rows_times_weights", x_ND, weight_EDF, bias_EF, ends_E)
    blocks = [x @ weight for x, weight in zip(_split(x_ND, ends_E), weight_EDF, strict=True)]
    if bias_EF is not None:
        blocks = [block + bias for block, bias in zip(blocks, bias_EF, strict=True)]
    return torch.cat(blocks)


@_products.register_fake
def _(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])


@torch.library.custom_op("dist_moe::group_outer_sums", mutates_args=())
def _outer_sums(x_ND: Tensor, grad_NF: Tensor, ends_E: Tensor) -> Tensor:
    if triton_runs(x_ND):
        return on_triton("triton_gemm", "outer_sums", x_ND, grad_NF, ends_E)
    pairs = zip(_split(x_ND, ends_E), _split(grad_NF, ends_E), strict=True)
    return torch.stack([x.t() @ grad for x, grad in pairs])


@_outer_sums.register_fake
def _(x_ND: Tensor, grad_NF: Tensor, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(ends_E.shape[0], x_ND.shape[1], grad_NF.shape[1])


@torch.library.custom_op("dist_moe::group_sums", mutates_args=())
def group_sums(rows_NF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, F): the sum of each group's rows, exactly 0 without rows."""
    if triton_runs(rows_NF):
        return on_triton("triton_gemm", "group_sums", rows_NF, ends_E)
    return torch.stack([rows.sum(0) for rows in _split(rows_NF, ends_E)])


@group_sums.register_fake
def _(rows_NF: Tensor, ends_E: Tensor) -> Tensor:
    return rows_NF.new_empty(ends_E.shape[0], rows_NF.shape[1])


def _split(rows_ND: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    return rows_ND.split(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())
