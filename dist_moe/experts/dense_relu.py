"""The recommender's expert: dense + ReLU + dropout (COMET supplement, section on architectures)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import LARGEST_SIZE
from dist_moe.experts.bank import ExpertBank, ExpertSettings, InitStds, drawn


class DenseReLUConfig(ExpertSettings):
    """A dense layer with ReLU, and dropout."""

    name: Literal["dense_relu"] = Field("dense_relu", description="which experts these are")
    units: int = Field(256, ge=1, le=LARGEST_SIZE, description="units of each expert: the width of its result")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout on the experts' results")

    def build(self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: InitStds = None) -> DenseReLUBank:
        """Return the experts ``expert_ids``; their first weights are glorot-uniform, whatever ``init_stds``."""
        return DenseReLUBank(dim, self.units, num_experts, expert_ids, self.dropout)

    def validation_errors(self, dim: int, out_dim: int | None = None) -> Iterator[str]:
        """Yield the width of the result where it is not the one that is needed."""
        if out_dim not in (None, self.units):
            yield f"experts.units={self.units}: the model needs results of width {out_dim}; use {out_dim}"


class DenseReLUBank(ExpertBank):
    """y = dropout(relu(x W_e + b_e)); ``weight`` (E_local, dim, hidden), ``bias`` (E_local, hidden).

    Weights are glorot-uniform, biases zero, drawn per expert from its global id.
    """

    matrices = ("weight",)

    def __init__(
        self, dim: int, hidden: int, num_experts: int, expert_ids: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__(dim, hidden, num_experts, expert_ids)
        self.weight = drawn((dim, hidden), self.generators())
        self.bias = nn.Parameter(torch.zeros(self.num_local_experts, hidden))
        self.dropout = dropout

    @property
    def kept_per_row(self) -> int:
        """Numbers kept: the ReLU's result; with dropout, its mask and its result, too."""
        return self.out_dim * (3 if self.dropout else 1)

    @property
    def accesses_per_row(self) -> float:
        """Accesses of the product, and twice as many for dropout."""
        return super().accesses_per_row + (10 * self.out_dim if self.dropout else 0)

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return the experts' results on their rows."""
        hidden_NF = self.grouped(x_ND, "weight", self.bias, rows_per_expert)
        return kernels.dropout(torch.relu(hidden_NF), self.dropout, self.training)

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return all experts' results by one batched product."""
        hidden_ETF = self.batched(x_TD.expand(self.num_local_experts, *x_TD.shape), "weight", self.bias)
        return kernels.dropout(torch.relu(hidden_ETF), self.dropout, self.training, under_vmap=True)
