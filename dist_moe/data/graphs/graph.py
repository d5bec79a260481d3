"""A graph in memory, and tables of its nodes, whose batches carry the whole graph or a sample of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.graphs.sampling import NeighbourSampler, SampledGraph

UNLABELLED = -1

Parts = Mapping[str, NDArray[np.int64]]
"""The nodes of "train", "val" and "test", in ascending order."""


@dataclass(frozen=True)
class RawGraph:
    """A graph as its files have it, N nodes and E edges.

    ``features_ND``: numbers of any type. ``edge_2E``: int64, source and target of each edge, as published.
    ``label_N``: int64, classes from 0; UNLABELLED where there is none. ``parts``: None if the files give no split.
    """

    features_ND: NDArray[Any]
    edge_2E: NDArray[np.int64]
    label_N: NDArray[np.int64]
    parts: Parts | None = None


@dataclass(frozen=True)
class Graph:
    """Features and edges as networks take them: ``x_ND`` fp32, ``edge_2E`` int64 [2, E], source over target."""

    x_ND: Tensor
    edge_2E: Tensor
    _copies: dict[torch.device, Graph] = field(default_factory=dict, repr=False, compare=False)

    @property
    def edges(self) -> Tensor:
        """The edges, as a sample has them, too."""
        return self.edge_2E

    def on(self, device: torch.device) -> Graph:
        """Return the graph on a device: always the same tensors, so that it is sent once."""
        if device == self.x_ND.device:
            return self
        if device not in self._copies:
            self._copies[device] = Graph(self.x_ND.to(device), self.edge_2E.to(device))
        return self._copies[device]


@dataclass(frozen=True)
class NodeBatch:
    """A share of a step: B nodes of ``graph``, and their classes; tokens are nodes."""

    graph: Graph | SampledGraph
    node_B: Tensor
    label_B: Tensor
    examples_in_step: int

    @property
    def tokens_in_step(self) -> int:
        """Nodes of the step, over all ranks and micro-batches."""
        return self.examples_in_step

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the model: features and edges of the graph, or of its sample, and the nodes asked for in it."""
        return self.graph.x_ND, self.graph.edges, self.node_B

    def __len__(self) -> int:
        return len(self.node_B)

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        moved = (self.graph.on(device), self.node_B.to(device), self.label_B.to(device))
        return type(self)(*moved, self.examples_in_step)


@dataclass(frozen=True)
class NodeTable:
    """The labelled nodes of a part of the data: ``node_N`` and ``label_N``, int64 each.

    ``sampler``: what draws the neighbours that a batch carries; None: it carries the whole graph.
    """

    graph: Graph
    node_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    sampler: NeighbourSampler | None = None

    def __len__(self) -> int:
        return len(self.node_N)

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> NodeBatch:
        """Return the rows ``index_B`` of a step that uses ``step_index`` over all ranks and micro-batches."""
        node_B, label_B = self.node_N[index_B], torch.from_numpy(self.label_N[index_B])
        if self.sampler is None:
            return NodeBatch(self.graph, torch.from_numpy(node_B), label_B, len(step_index))
        return NodeBatch(self.sampler.sample(node_B, step_index), torch.arange(len(node_B)), label_B, len(step_index))


@dataclass(frozen=True)
class NodeGraph:
    """A graph ready to learn from. ``manifest`` records source, counts, split and share of edges within a class."""

    graph: Graph
    train: NodeTable
    val: NodeTable
    test: NodeTable
    num_classes: int
    manifest: dict[str, Any]
