"""Shared-bottom: one network for all targets, a tower for each (Caruana, Multitask Learning, 1997). No experts."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Size
from dist_moe.models.dense_layers import dense_layers
from dist_moe.models.moe_model import ModelOutput, RunShape
from dist_moe.models.multi_task.front import Front, MultiTaskConfig, TableFeatures, TableModel


class SharedBottomConfig(MultiTaskConfig):
    """One dense network under a tower per target: the baseline without experts."""

    one_layer: ClassVar[bool] = False

    name: Literal["shared_bottom"] = Field("shared_bottom", description="which model this is")
    bottom_units: tuple[Size, ...] = Field((128, 64), min_length=1, description="units of the layers of the bottom")

    @property
    def num_moe_layers(self) -> int:
        """Return 0: every parameter is dense."""
        return 0

    def build(self, features: TableFeatures, targets: tuple[str, ...], run: RunShape) -> SharedBottom:
        """Return the model, which is whole on every rank."""
        return SharedBottom(Front(features, self.embedding_dim), self, len(targets))


class SharedBottom(TableModel):
    """h = ReLU(MLP(x)) for all targets."""

    def __init__(self, front: Front, config: SharedBottomConfig, num_targets: int) -> None:
        super().__init__(front, config.bottom_units[-1], num_targets, config.tower_units)
        self.bottom = dense_layers([front.width, *config.bottom_units])

    def forward(self, ids_BC: Tensor, numeric_BM: Tensor, lists_BP: Tensor) -> ModelOutput:
        """Return the predictions of each target."""
        h_BF = torch.relu(self.bottom(self.front(ids_BC, numeric_BM, lists_BP)))
        return ModelOutput(self.predictions([h_BF] * len(self.towers)), ())
