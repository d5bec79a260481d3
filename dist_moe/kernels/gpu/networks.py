"""Linear maps and two-layer networks per group of rows, on an accelerator: arithmetic and what is kept.

The products of a group are those of the CPU's kernels; see feed_forward.py for the mathematics. Between the
layers the active rows live in slices only: slices of equally many rows, whatever the groups, whose boundaries
the device works out. So the forward pass needs little beside what it takes, gives and keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels.activations import ACTIVATIONS
from dist_moe.kernels.device_path import ends_of_groups
from dist_moe.kernels.gpu.glu import gated, gated_backward
from dist_moe.kernels.gpu.grouped_gemm import group_sums, outer_sums, products

if TYPE_CHECKING:
    from dist_moe.kernels.feed_forward import FeedForwardWeights

SLICES = 16
FEWEST_ROWS_TO_SLICE = 16 * 1024


def grouped_linear(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor, rows_per_group: Tensor) -> Tensor:
    """As :func:`dist_moe.kernels.grouped_linear`, with counts (E,) on the device."""
    result: Tensor = _GroupedLinear.apply(x_ND, weight_EDF, bias_EF, ends_of_groups(rows_per_group))
    return result


def feed_forward(x_ND: Tensor, weights: FeedForwardWeights, activation: str, rows_per_group: Tensor) -> Tensor:
    """As :func:`dist_moe.kernels.feed_forward`, with counts (E,) on the device."""
    result: Tensor = _FeedForward.apply(x_ND, ends_of_groups(rows_per_group), activation, *weights)
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EDF, ends_E)
        return products(x_ND, weight_EDF, ends_E, bias_EF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, weight_EDF, ends_E = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x_ND = products(grad_NF, weight_EDF.transpose(1, 2), ends_E)
        return grad_x_ND, outer_sums(x_ND, grad_NF, ends_E), group_sums(grad_NF, ends_E), None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        ends_E: Tensor,
        activation: str,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        up_NF = products(x_ND, up, ends_E, up_bias)
        gate_NF = None if gate is None else products(x_ND, gate, ends_E)
        ctx.save_for_backward(x_ND, ends_E, up_NF, gate_NF, up, down, gate)
        ctx.activation, ctx.has_biases = activation, (up_bias is not None, down_bias is not None)
        if x_ND.shape[0] < FEWEST_ROWS_TO_SLICE:
            return products(_active(gate_NF, up_NF, activation), down, ends_E, down_bias)
        y_ND = x_ND.new_empty(x_ND.shape[0], down.shape[2])
        for start, end in _slices(x_ND.shape[0]):
            active = _active(None if gate_NF is None else gate_NF[start:end], up_NF[start:end], activation)
            y_ND[start:end] = products(active, down, (ends_E - start).clamp(0, end - start), down_bias)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, ends_E, up_NF, gate_NF, up, down, gate = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        spare_NF = _active(gate_NF, up_NF, ctx.activation)
        grad_down = outer_sums(spare_NF, grad_ND, ends_E)
        grad_up_NF = products(grad_ND, down.transpose(1, 2), ends_E)
        grad_gate = None
        if gate_NF is None:
            del spare_NF
            ACTIVATIONS[ctx.activation].backward(grad_up_NF, up_NF, grad_up_NF)
            grad_x_ND = products(grad_up_NF, up.transpose(1, 2), ends_E)
        else:
            gated_backward(grad_up_NF, gate_NF, up_NF, spare_NF, ctx.activation)
            grad_gate = outer_sums(x_ND, spare_NF, ends_E)
            grad_x_ND = products(grad_up_NF, up.transpose(1, 2), ends_E)
            _add_products(grad_x_ND, spare_NF, gate.transpose(1, 2), ends_E)
        grad_up = outer_sums(x_ND, grad_up_NF, ends_E)
        up_bias, down_bias = ctx.has_biases
        grad_up_bias = group_sums(grad_up_NF, ends_E) if up_bias else None
        grad_down_bias = group_sums(grad_ND, ends_E) if down_bias else None
        return grad_x_ND, None, None, grad_up, grad_down, grad_gate, grad_up_bias, grad_down_bias


def _active(gate_NF: Tensor | None, up_NF: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation].function(up_NF) if gate_NF is None else gated(gate_NF, up_NF, activation)


def _add_products(total_ND: Tensor, rows_NF: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> None:
    for start, end in _slices(rows_NF.shape[0]):
        total_ND[start:end] += products(rows_NF[start:end], weight_EFD, (ends_E - start).clamp(0, end - start))


def _slices(rows: int) -> Iterator[tuple[int, int]]:
    """``SLICES`` of about equally many rows; one of few rows."""
    slices = 1 if rows < FEWEST_ROWS_TO_SLICE else SLICES
    return ((rows * i // slices, rows * (i + 1) // slices) for i in range(slices))
