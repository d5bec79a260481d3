"""Softmax: the dense mixture of all experts, g = softmax(W x + b); the comparison without sparsity.

Jacobs, Jordan, Nowlan, Hinton: Adaptive Mixtures of Local Experts (Neural Computation 1991).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine


@GATES.register
class SoftmaxConfig(GateSettings):
    """The softmax gate: every token uses every expert."""

    stackable: ClassVar[bool] = True

    name: Literal["softmax"] = "softmax"

    def build(self, dim: int, num_experts: int, context: GateContext) -> Softmax:
        """Return the gate with these options."""
        return Softmax(dim, num_experts)


class Softmax(Gate):
    """``weight`` (n, dim), glorot-uniform, and ``bias`` (n,), zero."""

    can_exclude = True

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_experts, dim)))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the softmax over all slots that are not excluded."""
        return Mixture(self.logits(x_TD).softmax(dim=-1).unsqueeze(1))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the (T, n) logits, -inf for excluded slots."""
        return self.exclude(affine(x_TD, self.weight, self.bias))

    @property
    def rows_ED(self) -> Tensor | None:
        """The router's (n, dim) rows."""
        return self.weight
