"""Models of the nodes of a graph, each of a network or of two."""

from dist_moe.models.graphs.classifier import NodeClassifier, NodeClassifierConfig
from dist_moe.models.graphs.networks import NETWORKS, NetworkConfig, NetworkSettings, NodeNetwork
from dist_moe.models.graphs.weak_strong import WeakStrongConfig, WeakStrongNodes, logits_of_some

__all__ = [
    "NETWORKS",
    "NetworkConfig",
    "NetworkSettings",
    "NodeClassifier",
    "NodeClassifierConfig",
    "NodeNetwork",
    "WeakStrongConfig",
    "WeakStrongNodes",
    "logits_of_some",
]
