"""Triton: products of ragged groups of rows, whose sizes only the device knows.

The host launches as many programs as any sizes could need: ceil(N / block) + E tiles of rows, since every
group wastes less than one. A program finds its group among the running tile counts; those left over end at
once. Imported where Triton is there, that is beside a GPU or under its interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the type of sums over rows of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which a matrix product takes its factors. Triton's interpreter, which is numpy, has no bf16."""
    return accumulator(dtype) if triton.knobs.runtime.interpret else _TYPES[dtype]


def _precision(dtype: torch.dtype) -> str:
    """fp32 factors stay fp32, unless ``torch.set_float32_matmul_precision`` allows TF32."""
    lower = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if lower else "ieee"


def _stages_and_warps(dtype: torch.dtype) -> dict[str, int]:
    """Fixed, not tuned at the first call: tuning would time kernels, which waits for the device."""
    return {"num_stages": 3, "num_warps": 8} if dtype.itemsize == 2 else {"num_stages": 2, "num_warps": 4}


def rows_times_weights(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    """Return (N, F): (N, D) rows of group e times ``weight_EDF[e]``, of any strides, plus ``bias_EF[e]``."""
    (rows, width), (groups, _, out_width) = x_ND.shape, weight_EDF.shape
    y_NF = x_ND.new_empty(rows, out_width)
    if y_NF.numel() == 0:
        return y_NF
    block_n, block_d, block_f = _blocks(x_ND, rows // groups, width, out_width)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    tile_ends_E = ((counts_E + block_n - 1) // block_n).cumsum(0, dtype=torch.int32)
    tiles = (triton.cdiv(rows, block_n) + groups) * triton.cdiv(out_width, block_f)
    _rows_times_weights[(tiles,)](
        x_ND, weight_EDF, weight_EDF if bias_EF is None else bias_EF.contiguous(), y_NF, ends_E, tile_ends_E, groups,
        width, out_width, *x_ND.stride(), *weight_EDF.stride(),
        GROUPS=triton.next_power_of_2(groups), HAS_BIAS=bias_EF is not None, BLOCK_N=block_n, BLOCK_D=block_d,
        BLOCK_F=block_f, DOT=_dot_type(x_ND.dtype), SUM=accumulator(x_ND.dtype), PRECISION=_precision(x_ND.dtype),
        **_stages_and_warps(x_ND.dtype),
    )  # fmt: skip
    return y_NF


def outer_sums(x_ND: Tensor, grad_NF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, D, F): of each group the sum over its rows of the outer product of both rows, 0 without rows."""
    groups, width, out_width = len(ends_E), x_ND.shape[1], grad_NF.shape[1]
    sums_EDF = x_ND.new_empty(groups, width, out_width)
    if sums_EDF.numel() == 0:
        return sums_EDF
    block_n, block_d, block_f = _blocks(x_ND, len(x_ND) // groups, width, out_width)
    block_d, block_n = max(block_d, min(128, _tile(width))) if x_ND.element_size() == 2 else block_d, min(block_n, 64)
    _outer_sums[(groups * triton.cdiv(width, block_d) * triton.cdiv(out_width, block_f),)](
        x_ND, grad_NF, sums_EDF, ends_E, width, out_width, *x_ND.stride(), *grad_NF.stride(),
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_F=block_f, DOT=_dot_type(x_ND.dtype), SUM=accumulator(x_ND.dtype),
        PRECISION=_precision(x_ND.dtype), **_stages_and_warps(x_ND.dtype),
    )  # fmt: skip
    return sums_EDF


def group_sums(rows_NF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, F): the sum of each group's rows, 0 without rows."""
    groups, width = len(ends_E), rows_NF.shape[1]
    sums_EF = rows_NF.new_empty(groups, width)
    block_f = min(128, _tile(width))
    if sums_EF.numel():
        _group_sums[(groups, triton.cdiv(width, block_f))](
            rows_NF, sums_EF, ends_E, width, *rows_NF.stride(),
            BLOCK_N=32, BLOCK_F=block_f, SUM=accumulator(rows_NF.dtype),
        )  # fmt: skip
    return sums_EF


def _blocks(x: Tensor, mean_rows: int, width: int, out_width: int) -> tuple[int, int, int]:
    """Rows, inner width and outer width of a tile: small where a group or the widths are."""
    largest = {8: (32, 32, 32), 4: (64, 32, 64), 2: (128, 64, 128)}[x.element_size()]
    block_n, block_d, block_f = (
        min(most, _tile(size)) for most, size in zip(largest, (mean_rows, width, out_width), strict=True)
    )
    return block_n, block_d, block_f


def _tile(size: int) -> int:
    """The smallest block of a matrix product that takes ``size`` at once."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _rows_times_weights(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, ends: tl.tensor, tile_ends: tl.tensor,
    groups: tl.tensor, width: tl.tensor, out_width: tl.tensor,
    x_n: tl.tensor, x_d: tl.tensor, weight_e: tl.tensor, weight_d: tl.tensor, weight_f: tl.tensor,
    GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tiles_f = tl.cdiv(out_width, BLOCK_F)
    tile = tl.program_id(0) // tiles_f
    each = tl.arange(0, GROUPS)
    tile_end = tl.load(tile_ends + each, mask=each < groups, other=2147483647)
    group = tl.sum((tile_end <= tile).to(tl.int32), axis=0)
    if group < groups:
        first_tile = tl.max(tl.where(tile_end <= tile, tile_end, 0), axis=0)
        start = tl.load(ends + group - 1, mask=group > 0, other=0)
        n = start + (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        f = (tl.program_id(0) % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
        in_group = n < tl.load(ends + group)
        x_rows = x + n.to(tl.int64)[:, None] * x_n
        weights = weight + group.to(tl.int64) * weight_e + f[None, :] * weight_f
        total = tl.zeros((BLOCK_N, BLOCK_F), dtype=SUM)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            x_tile = tl.load(x_rows + d[None, :] * x_d, mask=in_group[:, None] & (d < width)[None, :], other=0)
            w_tile = tl.load(
                weights + d.to(tl.int64)[:, None] * weight_d,
                mask=(d < width)[:, None] & (f < out_width)[None, :],
                other=0,
            )
            total = tl.dot(x_tile.to(DOT), w_tile.to(DOT), total, input_precision=PRECISION, out_dtype=SUM)
        if HAS_BIAS:
            total += tl.load(bias + group * out_width + f, mask=f < out_width, other=0).to(SUM)[None, :]
        place = y + n.to(tl.int64)[:, None] * out_width + f[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=in_group[:, None] & (f < out_width)[None, :])


@triton.jit
def _outer_sums(
    x: tl.tensor, grad: tl.tensor, sums: tl.tensor, ends: tl.tensor,
    width: tl.tensor, out_width: tl.tensor,
    x_n: tl.tensor, x_d: tl.tensor, grad_n: tl.tensor, grad_f: tl.tensor,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tiles_d, tiles_f = tl.cdiv(width, BLOCK_D), tl.cdiv(out_width, BLOCK_F)
    group = tl.program_id(0) // (tiles_d * tiles_f)
    tile = tl.program_id(0) % (tiles_d * tiles_f)
    d = (tile // tiles_f) * BLOCK_D + tl.arange(0, BLOCK_D)
    f = (tile % tiles_f) * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros((BLOCK_D, BLOCK_F), dtype=SUM)
    for first in range(start, end, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        x_tile = tl.load(
            x + n[None, :] * x_n + d[:, None] * x_d, mask=(n < end)[None, :] & (d < width)[:, None], other=0
        )
        grad_tile = tl.load(
            grad + n[:, None] * grad_n + f[None, :] * grad_f,
            mask=(n < end)[:, None] & (f < out_width)[None, :],
            other=0,
        )
        total = tl.dot(x_tile.to(DOT), grad_tile.to(DOT), total, input_precision=PRECISION, out_dtype=SUM)
    place = sums + group.to(tl.int64) * width * out_width + d.to(tl.int64)[:, None] * out_width + f[None, :]
    tl.store(place, total.to(sums.dtype.element_ty), mask=(d < width)[:, None] & (f < out_width)[None, :])


@triton.jit
def _group_sums(
    rows: tl.tensor, sums: tl.tensor, ends: tl.tensor,
    width: tl.tensor,
    rows_n: tl.tensor, rows_f: tl.tensor,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros((BLOCK_F,), dtype=SUM)
    for first in range(start, end, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < end)[:, None] & (f < width)[None, :]
        total += tl.sum(tl.load(rows + n[:, None] * rows_n + f[None, :] * rows_f, mask=mask, other=0).to(SUM), axis=0)
    tl.store(sums + group.to(tl.int64) * width + f, total.to(sums.dtype.element_ty), mask=f < width)
