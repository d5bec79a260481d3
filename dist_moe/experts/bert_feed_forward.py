"""MoEBERT's expert: BERT's whole feed-forward block, with the residual and a LayerNorm of its own inside.

Built by a BERT's section of the configuration, not registered by name: width, activation, epsilon and dropout are those
of the checkpoint that the model starts from, not fields of the experts.

Zuo, Zhang, Liang, He, Zhao, Chen: MoEBERT (NAACL 2022); COMET-BERT uses the same experts. A layer mixes what
comes out of the LayerNorms, so a gate's weights must sum to 1, or hidden states shrink.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe import kernels
from dist_moe.experts.feed_forward import FeedForwardBank

BERT_EPS = 1e-12


class BertFeedForwardBank(FeedForwardBank):
    """y = LN_e(x + dropout(act(x U_e + b_e) V_e + c_e)), rows of width ``dim`` in and out.

    Parameters: those of :class:`FeedForwardBank` with biases, and ``norm_weight``, ``norm_bias`` (E_local, dim),
    ones and zeros at first. ``norm_eps``: added to the variance. ``dropout``: on what the network gives, while
    training.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        expert_ids: Sequence[int],
        *,
        activation: str = "gelu",
        dropout: float = 0.1,
        norm_eps: float = BERT_EPS,
    ) -> None:
        super().__init__(dim, hidden, num_experts, expert_ids, activation=activation, bias=True)
        self.norm_weight = nn.Parameter(torch.ones(self.num_local_experts, dim))
        self.norm_bias = nn.Parameter(torch.zeros(self.num_local_experts, dim))
        self.dropout = dropout
        self.norm_eps = norm_eps

    @property
    def kept_per_row(self) -> int:
        """Numbers kept of the network, what goes into the LayerNorm with its two moments, and dropout's mask."""
        return super().kept_per_row + self.dim * (2 if self.dropout else 1) + 2

    @property
    def accesses_per_row(self) -> float:
        """Accesses of the products, and of dropout."""
        return super().accesses_per_row + (10 * self.out_dim if self.dropout else 0)

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return LayerNorms of rows plus results."""
        added_ND = kernels.dropout(super().forward(x_ND, rows_per_expert), self.dropout, self.training)
        return kernels.grouped_layer_norm(
            x_ND + added_ND, self.norm_weight, self.norm_bias, self.norm_eps, rows_per_expert
        )

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return all experts' LayerNorms of rows plus results."""
        added_ETD = kernels.dropout(super().all_experts(x_TD), self.dropout, self.training, under_vmap=True)
        normal_ETD = F.layer_norm(x_TD + added_ETD, (self.dim,), eps=self.norm_eps)
        return normal_ETD * self.norm_weight.unsqueeze(1) + self.norm_bias.unsqueeze(1)
