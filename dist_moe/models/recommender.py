"""The COMET paper's recommender: two embeddings, experts, one gate and one tower per task.

COMET supplement, MovieLens: embeddings of 128 for user and item, concatenated; 16 experts of 256
units (ReLU, dropout 0.5); per task a gate and a tower dense 256 ReLU -> 1. Initialisers are Keras'
defaults, which the authors used: U(-0.05, 0.05) for embeddings, glorot-uniform for dense layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import CometConfig, GateConfig
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import World, experts_of_rank
from dist_moe.search import PermutationSearch, PermutationSearchConfig
from dist_moe.settings import Settings

TASKS = ("watched", "rating")
EMBEDDING_INIT_RANGE = 0.05


class RecommenderConfig(Settings):
    """Two-task recommender over (user, item) pairs."""

    embedding_dim: int = Field(128, ge=1, description="width of each of the two embeddings")
    num_experts: int = Field(16, ge=2, description="experts in all, over all ranks")
    expert_units: int = Field(256, ge=1, description="units of each expert")
    tower_units: int = Field(256, ge=1, description="units of each task's tower")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout on the experts' outputs")
    gate: GateConfig = Field(
        default_factory=lambda: CometConfig(), description="the gate; each task has one of its own"
    )
    permutation: PermutationSearchConfig | None = Field(
        None, description="permutation local search, one table for both tasks (null: none)"
    )

    def build(self, num_users: int, num_items: int, steps_per_epoch: int, world: World) -> Recommender:
        """The model with this rank's experts; all ranks must have seeded torch alike."""
        dim = 2 * self.embedding_dim
        experts = DenseReLUBank(
            dim,
            self.expert_units,
            self.num_experts,
            experts_of_rank(self.num_experts, world),
            self.dropout,
        )
        gates = [self.gate.build(dim, self.num_experts) for _ in TASKS]
        permutation = self.permutation and self.permutation.build(self.num_experts, steps_per_epoch)
        moe = MoE(gates, experts, permutation or None, world)
        return Recommender(num_users, num_items, self.embedding_dim, moe, self.tower_units)


@dataclass(frozen=True)
class RecommenderOutput:
    """``watched_logit_B``, ``rating_B``: (B,) predictions; ``moe``: what the layer did."""

    watched_logit_B: Tensor
    rating_B: Tensor
    moe: MoEOutput


class Recommender(nn.Module):
    """``model(user_B, item_B)``: int64 indices of B pairs (B may be 0) -> RecommenderOutput."""

    def __init__(self, num_users: int, num_items: int, embedding_dim: int, moe: MoE, tower_units: int) -> None:
        super().__init__()
        self.user_embedding = _embedding(num_users, embedding_dim)
        self.item_embedding = _embedding(num_items, embedding_dim)
        self.moe = moe
        self.towers = nn.ModuleList(_tower(moe.experts.out_dim, tower_units) for _ in TASKS)

    @property
    def permutation(self) -> PermutationSearch | None:
        source = self.moe.permutation
        return source if isinstance(source, PermutationSearch) else None

    def forward(self, user_B: Tensor, item_B: Tensor) -> RecommenderOutput:
        x_BD = torch.cat([self.user_embedding(user_B), self.item_embedding(item_B)], dim=1)
        mixed = self.moe(x_BD)
        watched, rating = (tower(output).squeeze(1) for tower, output in zip(self.towers, mixed.outputs, strict=True))
        return RecommenderOutput(watched, rating, mixed)


def _embedding(count: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(count, dim)
    nn.init.uniform_(embedding.weight, -EMBEDDING_INIT_RANGE, EMBEDDING_INIT_RANGE)
    return embedding


def _tower(dim: int, units: int) -> nn.Sequential:
    tower = nn.Sequential(nn.Linear(dim, units), nn.ReLU(), nn.Linear(units, 1))
    for layer in (tower[0], tower[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return tower
