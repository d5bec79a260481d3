"""One network that classifies nodes: the model of a GNN, or of an MLP, alone. It has no experts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dist_moe.models.graphs.networks import GCNConfig, NetworkConfig, NodeNetwork, Sample
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape


class NodeModelConfig(MoEModelConfig):
    """Base of the models of nodes: dense, with no layer of experts that are chosen by tokens."""

    kind: ClassVar[str] = "nodes"
    one_layer: ClassVar[bool] = False

    @property
    def num_moe_layers(self) -> int:
        """Return 0: every parameter is dense."""
        return 0


class NodeClassifierConfig(NodeModelConfig):
    """A network that classifies nodes."""

    name: Literal["node_classifier"] = Field("node_classifier", description="which model this is")
    network: NetworkConfig = Field(default_factory=lambda: GCNConfig(), description="the network")

    def build(self, num_features: int, num_classes: int, run: RunShape) -> NodeClassifier:
        """Return the model, which is whole on every rank. Raises UserError if the network cannot be built."""
        return NodeClassifier(self.network.build(num_features, num_classes))


class NodeClassifier(MoEModel):
    """``model(x_ND, edge_2E, node_B)`` -> (B, C) logits of the nodes ``node_B``."""

    def __init__(self, network: NodeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_ND: Tensor, edge_2E: Tensor | Sample, node_B: Tensor) -> ModelOutput:
        """Return the logits."""
        return ModelOutput((self.network(x_ND, edge_2E, node_B),), ())
