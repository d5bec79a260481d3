"""Two-layer networks, one per group of rows, over stacks of weights: the feed-forward expert of transformers.

    plain   y = act(x U + b) V + c
    gated   y = (act(x W) * (x U + b)) V + c         (Shazeer: GLU Variants Improve Transformer, 2020)

As separate operations the hidden rows are written and read several times, and autograd keeps them as often.
Here a group's activations live in a core's cache only. Kept for the backward pass are the rows and what went
into the activation: what the mathematics needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels import gpu
from dist_moe.kernels.across_cores import across_cores
from dist_moe.kernels.operands import ACTIVATIONS, FeedForwardWeights, RowCounts, check_counts, ends_of_groups


def feed_forward(x_ND: Tensor, weights: FeedForwardWeights, activation: str, rows_per_group: RowCounts) -> Tensor:
    """Send rows of group e through network e.

    ``x_ND``: (N, D), sorted by group; ``rows_per_group``: E counts, zeros allowed, summing to N;
    ``activation``: a key of ``ACTIVATIONS``. Returns (N, D'). A group without rows gets a zero gradient,
    never none. Raises ValueError when the counts do not fit.
    """
    check_counts(rows_per_group, len(weights.up), len(x_ND))
    if torch.is_autocast_enabled(x_ND.device.type) and x_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weights = x_ND.to(dtype), weights.each(lambda weight: weight.to(dtype))
    if isinstance(rows_per_group, Tensor):
        return gpu.FeedForward.apply(x_ND, ends_of_groups(rows_per_group), activation, *weights)
    return _FeedForward.apply(x_ND, rows_per_group, activation, *weights)


def feed_forward_reference(
    x_ND: Tensor, weights: FeedForwardWeights, activation: str, rows_per_group: list[int]
) -> Tensor:
    """Compute :func:`feed_forward` in a loop that autograd differentiates by itself."""
    act = ACTIVATIONS[activation].function
    results = []
    for e, x in enumerate(x_ND.split(rows_per_group)):
        hidden = x @ weights.up[e]
        if weights.up_bias is not None:
            hidden = hidden + weights.up_bias[e]
        hidden = act(hidden) if weights.gate is None else act(x @ weights.gate[e]) * hidden
        result = hidden @ weights.down[e]
        results.append(result if weights.down_bias is None else result + weights.down_bias[e])
    return torch.cat(results)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows_per_group: list[int], activation: str, *weights: Any) -> Tensor:
        w = FeedForwardWeights(*weights)
        act = ACTIVATIONS[activation]
        hidden = w.up.shape[2]
        up_NF = x_ND.new_empty(len(x_ND), hidden)
        gate_NF = None if w.gate is None else torch.empty_like(up_NF)
        y_ND = x_ND.new_empty(len(x_ND), w.down.shape[2])
        x, up, y = (rows.split(rows_per_group) for rows in (x_ND, up_NF, y_ND))
        gate = None if gate_NF is None else gate_NF.split(rows_per_group)

        def task(e: int, scratch: Tensor) -> None:
            if not len(x[e]):
                return
            active = scratch[0, : len(x[e])]
            _affine_into(x[e], w.up[e], w.up_bias, e, up[e])
            if gate is None or w.gate is None:
                act.into(up[e], active)
            else:
                torch.mm(x[e], w.gate[e], out=gate[e])
                act.into(gate[e], active).mul_(up[e])
            _affine_into(active, w.down[e], w.down_bias, e, y[e])

        ctx.work_per_row = sum(weight[0].numel() for weight in w[:3] if weight is not None)
        across_cores(task, rows_per_group, ctx.work_per_row, x_ND, 1, hidden)
        ctx.save_for_backward(x_ND, up_NF, gate_NF, *weights)
        ctx.rows_per_group, ctx.activation = rows_per_group, activation
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, up_NF, gate_NF, *weights = ctx.saved_tensors
        w = FeedForwardWeights(*weights)
        act = ACTIVATIONS[ctx.activation]
        grad_x_ND = torch.empty_like(x_ND)
        grads = w.each(torch.empty_like)
        x, up, grad_y, grad_x = (rows.split(ctx.rows_per_group) for rows in (x_ND, up_NF, grad_ND, grad_x_ND))
        gate = None if gate_NF is None else gate_NF.split(ctx.rows_per_group)

        def task(e: int, scratch: Tensor) -> None:
            active, grad_up = scratch[:2, : len(x[e])]
            torch.mm(grad_y[e], w.down[e].t(), out=grad_up)
            if gate is None or w.gate is None:
                act.into(up[e], active)
                torch.mm(active.t(), grad_y[e], out=grads.down[e])
                act.backward(grad_up, up[e], grad_up)
                torch.mm(grad_up, w.up[e].t(), out=grad_x[e])
            else:
                assert grads.gate is not None
                grad_gate = scratch[2, : len(x[e])]
                act.into(gate[e], active)
                torch.mul(grad_up, up[e], out=grad_gate)
                act.backward(grad_gate, gate[e], grad_gate)
                grad_up.mul_(active)
                torch.mm(active.mul_(up[e]).t(), grad_y[e], out=grads.down[e])
                torch.mm(grad_up, w.up[e].t(), out=grad_x[e])
                grad_x[e].addmm_(grad_gate, w.gate[e].t())
                torch.mm(x[e].t(), grad_gate, out=grads.gate[e])
            torch.mm(x[e].t(), grad_up, out=grads.up[e])
            for grad, grad_bias in ((grad_up, grads.up_bias), (grad_y[e], grads.down_bias)):
                if grad_bias is not None:
                    torch.sum(grad, dim=0, out=grad_bias[e])

        across_cores(task, ctx.rows_per_group, 2 * ctx.work_per_row, x_ND, 3 if gate else 2, up_NF.shape[1])
        return grad_x_ND, None, None, *grads


def _affine_into(x: Tensor, weight: Tensor, bias_EF: Tensor | None, e: int, out: Tensor) -> None:
    if bias_EF is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias_EF[e], x, weight, out=out)
