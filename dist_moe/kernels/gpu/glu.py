"""The gated activation act(gate) * up on an accelerator, in one pass: as separate operations it takes several."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.kernels.activations import ACTIVATIONS
from dist_moe.kernels.gpu.grouped_gemm import triton_runs


@torch.library.custom_op("dist_moe::gated", mutates_args=())
def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """act(gate) * up; both (N, F), contiguous. Not differentiable by itself, see :func:`gated_backward`."""
    if triton_runs(up_NF):
        from dist_moe.kernels.gpu import triton_glu

        with torch.cuda.device_of(gate_NF):
            return triton_glu.gated(gate_NF, up_NF, activation)
    return ACTIVATIONS[activation].function(gate_NF) * up_NF


@gated.register_fake
def _(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    return up_NF.new_empty(up_NF.shape)


@torch.library.custom_op("dist_moe::gated_backward", mutates_args=("grad_gate_NF", "grad_up_NF"))
def gated_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor, activation: str
) -> None:
    """From ``grad_NF``, the gradient of :func:`gated`, those of its arguments, which they may overwrite.

    All (N, F), contiguous.
    """
    if triton_runs(up_NF):
        from dist_moe.kernels.gpu import triton_glu

        with torch.cuda.device_of(grad_NF):
            triton_glu.gated_backward(grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF, activation)
        return
    act = ACTIVATIONS[activation]
    active_NF, linear_NF = act.function(gate_NF), grad_NF * up_NF
    act.backward(linear_NF, gate_NF, grad_gate_NF)
    torch.mul(grad_NF, active_NF, out=grad_up_NF)
