"""Linear maps, gated activations and two-layer networks per group of rows, on an accelerator; what is kept of them.

The products of a group are those of the CPU's kernels; see feed_forward.py for the mathematics. Between the
layers the active rows live in slices only: slices of equally many rows, whatever the groups, whose boundaries
the device works out. The backward pass writes the gradients of the hidden rows over these. So either pass
needs little beside what it takes, gives and keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels.gpu.grouped_gemm import group_sums, on_triton, outer_sums, products, triton_runs
from dist_moe.kernels.operands import ACTIVATIONS

MOST_SLICES = 16
FEWEST_ROWS = 8 * 1024
"""Rows of a slice: with fewer, its products would not fill a GPU."""


@torch.library.custom_op("dist_moe::gated", mutates_args=())
def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up; both (N, F), contiguous. Not differentiable by itself, see :func:`gated_backward`."""
    if triton_runs(up_NF):
        return on_triton("triton_rows", "gated", gate_NF, up_NF, activation)
    return ACTIVATIONS[activation].function(gate_NF) * up_NF


@gated.register_fake
def _(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    return up_NF.new_empty(up_NF.shape)


@torch.library.custom_op("dist_moe::gated_backward", mutates_args=("grad_gate_NF", "grad_up_NF"))
def gated_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor, activation: str
) -> None:
    """Write the gradients of :func:`gated` for ``grad_NF`` into the last two tensors, which may be its arguments.

    All (N, F), contiguous.
    """
    if triton_runs(up_NF):
        on_triton("triton_rows", "gated_backward", grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF, activation)
        return
    act = ACTIVATIONS[activation]
    active_NF, linear_NF = act.function(gate_NF), grad_NF * up_NF
    act.backward(linear_NF, gate_NF, grad_gate_NF)
    torch.mul(grad_NF, active_NF, out=grad_up_NF)


class GroupedLinear(torch.autograd.Function):
    """:func:`dist_moe.kernels.grouped_linear` with the ends of the groups, (E,) int32, on the device."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> Tensor:
        """Return (N, F) products plus biases."""
        ctx.save_for_backward(x_ND, weight_EDF, ends_E)
        return products(x_ND, weight_EDF, ends_E, bias_EF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of rows, weights and biases."""
        x_ND, weight_EDF, ends_E = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x_ND = products(grad_NF, weight_EDF.transpose(1, 2), ends_E)
        return grad_x_ND, outer_sums(x_ND, grad_NF, ends_E), group_sums(grad_NF, ends_E), None


class FeedForward(torch.autograd.Function):
    """:func:`dist_moe.kernels.feed_forward` with the ends of the groups, (E,) int32, on the device."""

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
        """Return (N, D') results, the active rows of a slice at a time."""
        x_ND = x_ND.contiguous()
        up_NF = products(x_ND, up, ends_E, up_bias)
        gate_NF = None if gate is None else products(x_ND, gate, ends_E)
        ctx.save_for_backward(x_ND, ends_E, up_NF, gate_NF, up, down, gate)
        ctx.activation, ctx.has_biases = activation, (up_bias is not None, down_bias is not None)
        y_ND = x_ND.new_empty(x_ND.shape[0], down.shape[2])
        for rows, ends in _slices(ends_E, x_ND):
            active = _active(None if gate_NF is None else gate_NF[rows], up_NF[rows], activation)
            y_ND[rows] = products(active, down, ends, down_bias)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and weights."""
        x_ND, ends_E, up_NF, gate_NF, up, down, gate = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_down = outer_sums(_active(gate_NF, up_NF, ctx.activation), grad_ND, ends_E)
        grad_up_NF, grad_gate_NF = _hidden_gradients(grad_ND, up_NF, gate_NF, down, ends_E, ctx.activation)
        grad_x_ND = products(grad_up_NF, up.transpose(1, 2), ends_E)
        grad_up, grad_gate = outer_sums(x_ND, grad_up_NF, ends_E), None
        if grad_gate_NF is not None:
            grad_gate = outer_sums(x_ND, grad_gate_NF, ends_E)
            for rows, ends in _slices(ends_E, grad_gate_NF):
                grad_x_ND[rows] += products(grad_gate_NF[rows], gate.transpose(1, 2), ends)
        up_bias, down_bias = ctx.has_biases
        grad_up_bias = group_sums(grad_up_NF, ends_E) if up_bias else None
        grad_down_bias = group_sums(grad_ND, ends_E) if down_bias else None
        return grad_x_ND, None, None, grad_up, grad_down, grad_gate, grad_up_bias, grad_down_bias


def _active(gate_NF: Tensor | None, up_NF: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation].function(up_NF) if gate_NF is None else gated(gate_NF, up_NF, activation)


def _hidden_gradients(
    grad_ND: Tensor, up_NF: Tensor, gate_NF: Tensor | None, down: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``up_NF`` and ``gate_NF``: in their place, unless the graph is kept for another backward pass."""
    in_place = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
    grad_up_NF = up_NF if in_place else torch.empty_like(up_NF)
    grad_gate_NF = gate_NF if in_place or gate_NF is None else torch.empty_like(gate_NF)
    for rows, ends in _slices(ends_E, grad_ND):
        grad = products(grad_ND[rows], down.transpose(1, 2), ends)
        if gate_NF is None or grad_gate_NF is None:
            ACTIVATIONS[activation].backward(grad, up_NF[rows], grad_up_NF[rows])
        else:
            gated_backward(grad, gate_NF[rows], up_NF[rows], grad_gate_NF[rows], grad_up_NF[rows], activation)
    return grad_up_NF, grad_gate_NF


def _slices(ends_E: Tensor, rows_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Up to ``MOST_SLICES`` slices of rows, and the ends of the groups in each."""
    num_rows = rows_ND.shape[0]
    slices = min(MOST_SLICES, max(num_rows // FEWEST_ROWS, 1))
    for i in range(slices):
        start, end = num_rows * i // slices, num_rows * (i + 1) // slices
        yield slice(start, end), (ends_E - start).clamp(0, end - start)
