"""The recommender's expert: dense + ReLU + dropout (COMET supplement, section on architectures)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.experts.bank import ExpertBank


class DenseReLUBank(ExpertBank):
    """y = dropout(relu(x W_e + b_e)); ``weight`` (E_local, dim, hidden), ``bias`` (E_local, hidden).

    Weights are glorot-uniform, biases zero, drawn per expert from its global id.
    """

    def __init__(
        self, dim: int, hidden: int, num_experts: int, expert_ids: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__(dim, hidden, num_experts, expert_ids)
        generators = self.generators()
        self.weight = nn.Parameter(torch.stack([self._draw(generator) for generator in generators]))
        self.bias = nn.Parameter(torch.zeros(self.num_local_experts, hidden))
        self.dropout = dropout

    def _draw(self, generator: torch.Generator) -> Tensor:
        empty = torch.empty(self.dim, self.out_dim)
        return nn.init.xavier_uniform_(empty, generator=generator)

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        hidden_NF = kernels.grouped_linear(x_ND, self.weight, self.bias, rows_per_expert)
        return kernels.dropout(torch.relu(hidden_NF), self.dropout, self.training)

    def all_experts(self, x_TD: Tensor) -> Tensor:
        x_ETD = x_TD.expand(self.num_local_experts, *x_TD.shape)
        hidden_ETF = torch.baddbmm(self.bias.unsqueeze(1), x_ETD, self.weight)
        return kernels.dropout_of_stacks(torch.relu(hidden_ETF), self.dropout, self.training)
