"""The common parts of recommenders on tables: configuration, embedding of a row's columns, towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_SIZE, Size
from dist_moe.models.dense_layers import dense_layers
from dist_moe.models.moe_model import MoEModel, MoEModelConfig

INIT_RANGE = 0.05
"""Embeddings begin uniform between minus and plus this, Keras' default."""


@dataclass(frozen=True)
class TableFeatures:
    """The columns of a table that a model sees, in numbers.

    ``sizes``: ids of each categorical column, 0..size-1. ``numeric``: number of numeric columns. ``lists``: of each
    column of lists, its number of ids and the length to which lists are filled up with -1.
    """

    sizes: tuple[int, ...]
    numeric: int = 0
    lists: tuple[tuple[int, int], ...] = ()

    @property
    def columns(self) -> int:
        """Number of columns of all kinds."""
        return len(self.sizes) + self.numeric + len(self.lists)


class MultiTaskConfig(MoEModelConfig):
    """The fields that every recommender on tables has."""

    kind: ClassVar[str] = "multi_task_table"

    embedding_dim: int = Field(16, ge=1, le=LARGEST_SIZE, description="width of each column's embedding")
    tower_units: tuple[Size, ...] = Field((64,), description="units of the hidden layers of each target's tower")


class Front(nn.Module):
    """``front(ids_BC, numeric_BM, lists_BP)`` -> (B, columns * dim): an embedding of each column, side by side:
    numbers, categories, lists.

    Columns with ids share one table, ``ids`` (sum of the sizes, dim); a list is the mean of its ids' embeddings, 0 if
    it is empty; number v of column m is v * ``scale[m]`` + ``shift[m]`` (M, dim). B may be 0. Raises ValueError for a
    table without columns.
    """

    first_id_C: Tensor

    def __init__(self, features: TableFeatures, dim: int) -> None:
        super().__init__()
        if not features.columns:
            raise ValueError("a table needs at least one column that a model can see")
        self.features = features
        self.width = features.columns * dim
        sizes = [*features.sizes, *(size for size, _ in features.lists)]
        self.ids = nn.Embedding(sum(sizes), dim) if sizes else None
        self.scale, self.shift = (
            nn.Parameter(torch.empty(features.numeric, dim)) if features.numeric else None for _ in range(2)
        )
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)
        self.register_buffer("first_id_C", torch.tensor([0, *sizes]).cumsum(0)[:-1])

    def forward(self, ids_BC: Tensor, numeric_BM: Tensor, lists_BP: Tensor) -> Tensor:
        """Return the embedded rows."""
        embedded = list[Tensor]()
        if self.scale is not None and self.shift is not None:
            embedded.append(numeric_BM.to(self.scale.dtype).unsqueeze(-1) * self.scale + self.shift)
        if self.ids is not None:
            first_id_C = self.first_id_C[: len(self.features.sizes)]
            embedded.append(self.ids(ids_BC + first_id_C))
            lists = lists_BP.split([length for _, length in self.features.lists], dim=1)
            for ids_BP, first_id in zip(lists, self.first_id_C[len(first_id_C) :], strict=True):
                there_BP1 = (ids_BP >= 0).unsqueeze(-1)
                sum_BD = (self.ids(ids_BP.clamp(min=0) + first_id) * there_BP1).sum(dim=1)
                embedded.append((sum_BD / there_BP1.sum(dim=1).clamp(min=1)).unsqueeze(1))
        return torch.cat(embedded, dim=1).flatten(1)


class TableModel(MoEModel):
    """A recommender on tables: ``model(ids_BC, numeric_BM, lists_BP)`` -> one (B,) prediction per target.

    Has a ``front``, and a tower per target on representations of width ``dim``. Gates that route by identity see the
    first categorical column.
    """

    def __init__(self, front: Front, dim: int, num_targets: int, tower_units: Sequence[int]) -> None:
        super().__init__()
        self.front = front
        self.towers = nn.ModuleList(dense_layers([dim, *tower_units, 1]) for _ in range(num_targets))

    def predictions(self, h_TBF: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return each target's (B,) logit or number, given its (B, F) representation."""
        return tuple(tower(h_BF).squeeze(1) for tower, h_BF in zip(self.towers, h_TBF, strict=True))


def routing_ids(ids_BC: Tensor) -> Tensor | None:
    """Return the ids of the first categorical column, None if there is none."""
    return ids_BC[:, 0] if ids_BC.shape[1] else None
