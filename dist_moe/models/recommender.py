"""The COMET paper's recommender: two embeddings, experts, one gate and one tower per task.

COMET supplement, MovieLens: embeddings of 128 for user and item, concatenated; 16 experts of 256
units (ReLU, dropout 0.5); per task a gate and a tower dense 256 ReLU -> 1. Initialisers are Keras'
defaults, which the authors used: U(-0.05, 0.05) for embeddings, glorot-uniform for dense layers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.experts import DenseReLUBank
from dist_moe.layer import MoE
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.parallel import experts_of_rank

EMBEDDING_INIT_RANGE = 0.05


class RecommenderConfig(MoEModelConfig):
    """Recommender over (user, item) pairs, with a gate and a tower for each target."""

    kind: ClassVar[str] = "recommendation"

    name: Literal["recommender"] = Field("recommender", description="which model this is")
    embedding_dim: int = Field(128, ge=1, description="width of each of the two embeddings")
    expert_units: int = Field(256, ge=1, description="units of each expert")
    tower_units: int = Field(256, ge=1, description="units of each task's tower")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout on the experts' outputs")

    def build(self, num_users: int, num_items: int, run: RunShape, num_targets: int = 2) -> Recommender:
        experts = DenseReLUBank(
            2 * self.embedding_dim,
            self.expert_units,
            self.num_experts,
            experts_of_rank(self.num_experts, run.world),
            self.dropout,
        )
        moe = self.build_layer(experts, num_targets, run)
        return Recommender(num_users, num_items, self.embedding_dim, moe, self.tower_units)


class Recommender(MoEModel):
    """``model(user_B, item_B)``: int64 indices of B pairs (B may be 0) -> (B,) predictions of each
    target: logits of "watched", then stars. Gates that route by identity see the user."""

    def __init__(self, num_users: int, num_items: int, embedding_dim: int, moe: MoE, tower_units: int) -> None:
        super().__init__()
        self.moe = moe
        self.user_embedding = _embedding(num_users, embedding_dim)
        self.item_embedding = _embedding(num_items, embedding_dim)
        self.towers = nn.ModuleList(_tower(moe.experts.out_dim, tower_units) for _ in moe.gates)

    def forward(self, user_B: Tensor, item_B: Tensor) -> ModelOutput:
        x_BD = torch.cat([self.user_embedding(user_B), self.item_embedding(item_B)], dim=1)
        mixed = self.moe(x_BD, user_B)
        predictions = (tower(y_BF).squeeze(1) for tower, y_BF in zip(self.towers, mixed.outputs, strict=True))
        return ModelOutput(tuple(predictions), (mixed,))


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
