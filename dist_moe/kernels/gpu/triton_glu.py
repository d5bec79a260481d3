"""Triton: the gated activation act(gate) * up and its gradients, each one pass; sums of nothing, so any order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dist_moe.kernels.gpu.triton_types import accumulator

BLOCK = 1024


def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """act(gate) * up. Both contiguous."""
    result_NF = up_NF.new_empty(up_NF.shape)
    size = up_NF.numel()
    if size:
        _gated[(triton.cdiv(size, BLOCK),)](
            gate_NF, up_NF, result_NF, size, ACT=activation, SUM=accumulator(up_NF.dtype), BLOCK=BLOCK
        )
    return result_NF


def gated_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor, activation: str
) -> None:
    """Writes ``grad_gate_NF`` and ``grad_up_NF``, which may be ``gate_NF`` and ``up_NF``. All contiguous."""
    size = up_NF.numel()
    if size:
        _gated_backward[(triton.cdiv(size, BLOCK),)](
            grad_NF,
            gate_NF,
            up_NF,
            grad_gate_NF,
            grad_up_NF,
            size,
            ACT=activation,
            SUM=accumulator(up_NF.dtype),
            BLOCK=BLOCK,
        )


@triton.jit
def _activate(h: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation of ``h`` and its derivative."""
    if ACT == "relu":
        value, slope = tl.where(h > 0, h, 0), tl.where(h > 0, 1.0, 0.0)
    elif ACT == "gelu":
        below = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        value, slope = h * below, below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    else:
        share = 1 / (1 + tl.exp(-h))
        value, slope = h * share, share * (1 + h * (1 - share))
    return value, slope


@triton.jit
def _gated(
    gate: tl.tensor,
    up: tl.tensor,
    result: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activate(tl.load(gate + i, mask=i < size, other=0).to(SUM), ACT)
    tl.store(
        result + i,
        (value * tl.load(up + i, mask=i < size, other=0).to(SUM)).to(result.dtype.element_ty),
        mask=i < size,
    )


@triton.jit
def _gated_backward(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    grad_gate: tl.tensor,
    grad_up: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, slope = _activate(tl.load(gate + i, mask=i < size, other=0).to(SUM), ACT)
    given = tl.load(grad + i, mask=i < size, other=0).to(SUM)
    linear = tl.load(up + i, mask=i < size, other=0).to(SUM)
    tl.store(grad_gate + i, (given * linear * slope).to(grad_gate.dtype.element_ty), mask=i < size)
    tl.store(grad_up + i, (given * value).to(grad_up.dtype.element_ty), mask=i < size)
