"""What every gate is, and the precision in which every gate computes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dist_moe.routing import Route


class Gate(nn.Module, ABC):
    """Tokens -> Route: ``gate(x_TD, ids_T=None)``.

    ``x_TD``: (T, D) routing input, T may be 0. ``ids_T``: (T,) integer ids, for gates that route by
    identity (hash routing); others ignore them. Arithmetic is fp32 under any autocast and for any
    input below fp64; an fp64 input is computed in fp64.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {num_experts}")
        self.dim = dim
        self.num_experts = num_experts

    @property
    def num_slots(self) -> int:
        return self.num_experts

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Route:
        if x_TD.dim() != 2 or x_TD.shape[1] != self.dim:
            raise ValueError(f"expected tokens of shape (T, {self.dim}), got {tuple(x_TD.shape)}")
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.route(x_TD.to(gate_dtype(x_TD)), ids_T)

    @abstractmethod
    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """The gate's mathematics, on tokens that have their final precision (fp32 or fp64)."""


def gate_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays fp64; anything lower is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
