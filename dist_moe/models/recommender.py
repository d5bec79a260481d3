"""The COMET paper's recommender: two embeddings, experts, one gate and one tower per task.

COMET supplement, MovieLens: embeddings of 128 for user and item, concatenated; 16 experts of 256
units (ReLU, dropout 0.5); per task a gate and a tower dense 256 ReLU -> 1. Initialisers are Keras'
defaults, which the authors used: U(-0.05, 0.05) for embeddings, glorot-uniform for dense layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_SIZE
from dist_moe.experts import EXPERTS, DenseReLUConfig, ExpertSettings
from dist_moe.layer import MoE
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.parallel import experts_of_rank


class RecommenderConfig(MoEModelConfig):
    """Recommender over (user, item) pairs, with a gate and a tower for each target."""

    kind: ClassVar[str] = "recommendation"

    name: Literal["recommender"] = Field("recommender", description="which model this is")
    embedding_dim: int = Field(128, ge=1, le=LARGEST_SIZE, description="width of each of the two embeddings")
    experts: Annotated[SerializeAsAny[ExpertSettings], EXPERTS.with_default("dense_relu")] = Field(
        default_factory=lambda: DenseReLUConfig(), description="the experts"
    )
    tower_units: int = Field(256, ge=1, le=LARGEST_SIZE, description="units of each task's tower")

    def validation_errors(self) -> Iterator[str]:
        """Yield what does not fit together, as "field=value: reason"; experts take both embeddings side by side."""
        yield from super().validation_errors()
        yield from self.experts.validation_errors(2 * self.embedding_dim)

    def build(self, num_users: int, num_items: int, run: RunShape, num_targets: int = 2) -> Recommender:
        """Return the model with this rank's experts; ``num_targets``: numbers that it predicts for a pair."""
        expert_ids = experts_of_rank(self.num_experts, run.world)
        experts = self.experts.build(2 * self.embedding_dim, self.num_experts, expert_ids)
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
        """Return predictions of each target, and what the MoE layer did."""
        x_BD = torch.cat([self.user_embedding(user_B), self.item_embedding(item_B)], dim=1)
        mixed = self.moe(x_BD, user_B)
        predictions = (tower(y_BF).squeeze(1) for tower, y_BF in zip(self.towers, mixed.outputs, strict=True))
        return ModelOutput(tuple(predictions), (mixed,))


def _embedding(count: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(count, dim)
    nn.init.uniform_(embedding.weight, -0.05, 0.05)
    return embedding


def _tower(dim: int, units: int) -> nn.Sequential:
    tower = nn.Sequential(nn.Linear(dim, units), nn.ReLU(), nn.Linear(units, 1))
    for layer in (tower[0], tower[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return tower
