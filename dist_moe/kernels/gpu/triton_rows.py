"""Triton: passes over rows. Tokens to their assignments, weighted rows back to their tokens, the gated activation.

No atomics: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_moe.kernels.gpu.triton_gemm import accumulator


def gather(x_TD: Tensor, token_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (N, D): row n is ``x_TD[token_N[n]]`` in ``dtype``."""
    rows_ND = x_TD.new_empty(len(token_N), x_TD.shape[1], dtype=dtype)
    if rows_ND.numel():
        width, block = x_TD.shape[1], _block(x_TD.shape[1])
        _gather[(len(token_N), triton.cdiv(width, block))](x_TD, token_N, rows_ND, width, *x_TD.stride(), BLOCK_F=block)
    return rows_ND


def token_sums(rows_NF: Tensor, weight_GN: Tensor, by_token_N: Tensor, start_T1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (G, T, F) in ``dtype``: out[g, t] = sum of weight[g, n] rows[n] over the rows n = ``by_token_N[i]`` of
    token t, whose i run from ``start_T1[t]`` to ``start_T1[t + 1]``, added in that order."""
    gates, width, tokens = len(weight_GN), rows_NF.shape[1], len(start_T1) - 1
    sums_GTF = rows_NF.new_empty(gates, tokens, width, dtype=dtype)
    if sums_GTF.numel():
        block = _block(width)
        _token_sums[(tokens, triton.cdiv(width, block))](
            rows_NF, weight_GN, by_token_N, start_T1, sums_GTF, gates, tokens, width, *rows_NF.stride(),
            *weight_GN.stride(),
            GATES=triton.next_power_of_2(gates), BLOCK_F=block, SUM=accumulator(dtype),
        )  # fmt: skip
    return sums_GTF


def token_sums_backward(grad_GTF: Tensor, rows_NF: Tensor, weight_GN: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`token_sums` to the rows and to the weights."""
    gates, width = len(weight_GN), rows_NF.shape[1]
    grad_rows_NF = rows_NF.new_empty(rows_NF.shape)
    grad_weight_GN = weight_GN.new_empty(weight_GN.shape)
    if grad_weight_GN.numel():
        _token_sums_backward[(len(token_N),)](
            grad_GTF, rows_NF, weight_GN, token_N, grad_rows_NF, grad_weight_GN, gates, len(token_N), width,
            *grad_GTF.stride(), *rows_NF.stride(), *weight_GN.stride(),
            GATES=triton.next_power_of_2(gates), BLOCK_F=_block(width), SUM=accumulator(weight_GN.dtype),
        )  # fmt: skip
    return grad_rows_NF, grad_weight_GN


def _block(width: int) -> int:
    return min(1024, triton.next_power_of_2(max(width, 1)))


@triton.jit
def _gather(
    x: tl.tensor, token_of: tl.tensor, rows: tl.tensor,
    width: tl.tensor,
    x_t: tl.tensor, x_f: tl.tensor,
    BLOCK_F: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.load(x + tl.load(token_of + n) * x_t + f * x_f, mask=f < width, other=0)
    tl.store(rows + n * width + f, row.to(rows.dtype.element_ty), mask=f < width)


@triton.jit
def _token_sums(
    rows: tl.tensor, weight: tl.tensor, by_token: tl.tensor, start_of: tl.tensor, sums: tl.tensor,
    gates: tl.tensor, tokens: tl.tensor, width: tl.tensor,
    rows_n: tl.tensor, rows_f: tl.tensor, weight_g: tl.tensor, weight_n: tl.tensor,
    GATES: tl.constexpr, BLOCK_F: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    g = tl.arange(0, GATES)
    total = tl.zeros((GATES, BLOCK_F), dtype=SUM)
    for i in range(tl.load(start_of + t), tl.load(start_of + t + 1)):
        n = tl.load(by_token + i)
        row = tl.load(rows + n * rows_n + f * rows_f, mask=f < width, other=0).to(SUM)
        share = tl.load(weight + g * weight_g + n * weight_n, mask=g < gates, other=0).to(SUM)
        total += share[:, None] * row[None, :]
    place = sums + (g[:, None] * tokens + t) * width + f[None, :]
    tl.store(place, total.to(sums.dtype.element_ty), mask=(g < gates)[:, None] & (f < width)[None, :])


@triton.jit
def _token_sums_backward(
    grad: tl.tensor, rows: tl.tensor, weight: tl.tensor, token_of: tl.tensor, grad_rows: tl.tensor,
    grad_weight: tl.tensor,
    gates: tl.tensor, num_rows: tl.tensor, width: tl.tensor,
    grad_g: tl.tensor, grad_t: tl.tensor, grad_f: tl.tensor, rows_n: tl.tensor, rows_f: tl.tensor,
    weight_g: tl.tensor, weight_n: tl.tensor,
    GATES: tl.constexpr, BLOCK_F: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    t = tl.load(token_of + n)
    g = tl.arange(0, GATES)
    share = tl.load(weight + g * weight_g + n * weight_n, mask=g < gates, other=0).to(SUM)
    along = tl.zeros((GATES,), dtype=SUM)
    for first in range(0, width, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        row = tl.load(rows + n * rows_n + f * rows_f, mask=f < width, other=0).to(SUM)
        given = tl.load(
            grad + g.to(tl.int64)[:, None] * grad_g + t * grad_t + f[None, :] * grad_f,
            mask=(g < gates)[:, None] & (f < width)[None, :],
            other=0,
        ).to(SUM)
        along += tl.sum(given * row[None, :], axis=1)
        grad_row = tl.sum(share[:, None] * given, axis=0)
        tl.store(grad_rows + n * width + f, grad_row.to(grad_rows.dtype.element_ty), mask=f < width)
    tl.store(grad_weight + g * num_rows + n, along.to(grad_weight.dtype.element_ty), mask=g < gates)


GATED_BLOCK = 1024


def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up. Both contiguous."""
    result_NF = up_NF.new_empty(up_NF.shape)
    size = up_NF.numel()
    if size:
        _gated[(triton.cdiv(size, GATED_BLOCK),)](
            gate_NF, up_NF, result_NF, size, ACT=activation, SUM=accumulator(up_NF.dtype), BLOCK=GATED_BLOCK
        )
    return result_NF


def gated_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor, activation: str
) -> None:
    """Write ``grad_gate_NF`` and ``grad_up_NF``, which may be ``gate_NF`` and ``up_NF``. All contiguous."""
    size = up_NF.numel()
    if size:
        _gated_backward[(triton.cdiv(size, GATED_BLOCK),)](
            grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF, size,
            ACT=activation, SUM=accumulator(up_NF.dtype), BLOCK=GATED_BLOCK,
        )  # fmt: skip


@triton.jit
def _activate(h: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation of ``h`` and its derivative."""
    if ACT == "relu":
        value, slope = tl.where(h <= 0, 0, h), tl.where(h <= 0, 0.0, 1.0)  # so that NaN stays NaN
    elif ACT == "gelu":
        below = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        value, slope = h * below, below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    else:
        share = 1 / (1 + tl.exp(-h))
        value, slope = h * share, share * (1 + h * (1 - share))
    return value, slope


@triton.jit
def _gated(
    gate: tl.tensor, up: tl.tensor, result: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activate(tl.load(gate + i, mask=i < size, other=0).to(SUM), ACT)
    tl.store(
        result + i,
        (value * tl.load(up + i, mask=i < size, other=0).to(SUM)).to(result.dtype.element_ty),
        mask=i < size,
    )


@triton.jit
def _gated_backward(
    grad: tl.tensor, gate: tl.tensor, up: tl.tensor, grad_gate: tl.tensor, grad_up: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, slope = _activate(tl.load(gate + i, mask=i < size, other=0).to(SUM), ACT)
    given = tl.load(grad + i, mask=i < size, other=0).to(SUM)
    linear = tl.load(up + i, mask=i < size, other=0).to(SUM)
    tl.store(grad_gate + i, (given * linear * slope).to(grad_gate.dtype.element_ty), mask=i < size)
    tl.store(grad_up + i, (given * value).to(grad_up.dtype.element_ty), mask=i < size)
