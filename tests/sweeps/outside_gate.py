"""A gate of the user's own that can join a stack: the example of docs/extending/gate.md, and what stacks ask for."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates import GATES, Gate, GateContext, GateSettings, Mixture


class NearestGate(Gate):
    """The k experts whose direction is nearest to that of the token."""

    def __init__(self, dim: int, num_experts: int, k: int, temperature: float) -> None:
        super().__init__(dim, num_experts)
        self.k, self.temperature = k, temperature
        self.direction = nn.Parameter(torch.randn(num_experts, dim) / dim**0.5)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        score_TE = nn.functional.cosine_similarity(x_TD[:, None], self.direction.to(x_TD.dtype), dim=-1)
        kept_TK, slot_TK = (score_TE / self.temperature).topk(self.k)
        return Mixture(torch.zeros_like(score_TE).scatter(1, slot_TK, kept_TK.softmax(1)).unsqueeze(1))


@GATES.register
class NearestGateConfig(GateSettings):
    """Settings of :class:`NearestGate`."""

    stackable: ClassVar[bool] = True
    varying: ClassVar[tuple[str, ...]] = ("temperature",)

    name: Literal["nearest_test_gate"] = "nearest_test_gate"
    k: int = Field(2, ge=1, description="experts per token")
    temperature: float = Field(0.1, gt=0, description="divides the similarities")

    def build(self, dim: int, num_experts: int, context: GateContext) -> NearestGate:
        """Return the gate."""
        return NearestGate(dim, num_experts, self.k, self.temperature)
