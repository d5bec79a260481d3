"""Mowst's model of nodes: a weak network on features, a strong one on neighbourhoods, and a confidence.

Sparse inference runs the strong network for the nodes alone that the confidence sends to it, on their neighbourhoods;
the results are those of a pass over the whole graph.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny
from torch import Tensor

from dist_moe.models.graphs.classifier import NodeModelConfig
from dist_moe.models.graphs.networks import (
    NETWORKS,
    GCNConfig,
    MLPConfig,
    NetworkConfig,
    NetworkSettings,
    NodeNetwork,
    Sample,
)
from dist_moe.models.graphs.sparse import rows_at
from dist_moe.models.moe_model import MoEModel, RunShape
from dist_moe.models.weak_strong import (
    ConfidenceConfig,
    DispersionConfig,
    Mixture,
    WeakStrong,
    WeakStrongOutput,
)


class WeakStrongConfig(NodeModelConfig):
    """A weak and a strong network, and the confidence that decides between them."""

    name: Literal["weak_strong"] = Field("weak_strong", description="which model this is")
    weak: Annotated[SerializeAsAny[NetworkSettings], NETWORKS.with_default("mlp")] = Field(
        default_factory=lambda: MLPConfig(), description="the weak network"
    )
    strong: NetworkConfig = Field(default_factory=lambda: GCNConfig(), description="the strong network")
    confidence: ConfidenceConfig = Field(
        default_factory=lambda: DispersionConfig(), description="how far a node is the weak network's"
    )
    mixture: Mixture = Field(
        "losses", description="what is mixed: losses (Mowst), predictions (Mowst*), logits (the code's Mowst*)"
    )

    def build(self, num_features: int, num_classes: int, run: RunShape) -> WeakStrongNodes:
        """Return the model, which is whole on every rank. Raises UserError if a network cannot be built."""
        weak, strong = (network.build(num_features, num_classes) for network in (self.weak, self.strong))
        return WeakStrongNodes(WeakStrong(weak, strong, self.confidence.build(num_features), self.mixture, rows_of))


def rows_of(x_ND: Tensor, edge_2E: Tensor | Sample, node_B: Tensor) -> Tensor:
    """Return the features of the nodes."""
    return x_ND[node_B]


class WeakStrongNodes(MoEModel):
    """``model(x_ND, edge_2E, node_B)`` -> what both networks give for the nodes ``node_B``."""

    def __init__(self, layer: WeakStrong) -> None:
        super().__init__()
        self.layer = layer

    @property
    def networks(self) -> tuple[NodeNetwork, NodeNetwork]:
        """The weak and the strong network."""
        weak, strong = self.layer.weak, self.layer.strong
        assert isinstance(weak, NodeNetwork)
        assert isinstance(strong, NodeNetwork)
        return weak, strong

    def forward(self, x_ND: Tensor, edge_2E: Tensor | Sample, node_B: Tensor) -> WeakStrongOutput:
        """Return the output of both networks."""
        output: WeakStrongOutput = self.layer(x_ND, edge_2E, node_B)
        return output

    def classify(self, x_ND: Tensor, edge_2E: Tensor, node_B: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Return (B,) classes, those of the strong network where the confidence is below ``threshold``; and where.

        The strong network runs for these nodes alone, see :func:`logits_of_some`. Needs evaluation mode.
        """

        def strong_of(asks_B: Tensor) -> Tensor:
            return logits_of_some(self.networks[1], x_ND, edge_2E, node_B[asks_B])

        return self.layer.classify(x_ND, edge_2E, node_B, threshold=threshold, strong_of=strong_of)


def logits_of_some(network: NodeNetwork, x_ND: Tensor, edge_2E: Tensor, node_B: Tensor) -> Tensor:
    """Return (B, C) logits of different nodes, computed on their neighbourhood alone; as those of the whole graph.

    Needs evaluation mode: statistics of batches would be those of the neighbourhood.
    """
    if network.hops == 0:
        logits: Tensor = network(x_ND, edge_2E, node_B)
        return logits
    from torch_geometric.utils import k_hop_subgraph

    edges = network.edges(edge_2E, len(x_ND))
    near_N, part_2E, place_B, kept_E = k_hop_subgraph(
        node_B, network.hops, edges[0], relabel_nodes=True, num_nodes=len(x_ND)
    )
    return network.rows(
        rows_at(network.features(x_ND), near_N), part_2E, *(weight_E[kept_E] for weight_E in edges[1:])
    )[place_B]
