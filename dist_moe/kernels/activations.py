"""Activations with their derivatives, for kernels that write their backward passes themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``into(h, out)``: writes the activation of ``h``; ``backward(grad, h, out)``: ``grad`` times its derivative
    at ``h``. ``out`` may be ``grad`` itself."""

    function: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(
        torch.relu,
        lambda h, out: torch.clamp_min(h, 0, out=out),
        lambda grad, h, out: _aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
    ),
    "gelu": Activation(
        torch.nn.functional.gelu,
        lambda h, out: _aten.gelu.out(h, out=out),
        lambda grad, h, out: _aten.gelu_backward.grad_input(grad, h, grad_input=out),
    ),
    "silu": Activation(
        torch.nn.functional.silu,
        lambda h, out: _aten.silu.out(h, out=out),
        lambda grad, h, out: _aten.silu_backward.grad_input(grad, h, grad_input=out),
    ),
}
"""ReLU; the exact GELU x Phi(x) (Hendrycks and Gimpel, 2016); SiLU x sigmoid(x)."""
