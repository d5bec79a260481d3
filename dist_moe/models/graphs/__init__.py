"""Models of the nodes of a graph, each of a network or of two."""

from dist_moe.models.graphs.classifier import NodeClassifier, NodeClassifierConfig
from dist_moe.models.graphs.networks import NETWORKS, NetworkConfig, NetworkSettings, NodeNetwork, Sample
from dist_moe.models.graphs.weak_strong import WeakStrongConfig, WeakStrongNodes, logits_of_some

__all__ = [
    "NETWORKS",
    "NetworkConfig",
    "NetworkSettings",
    "NodeClassifier",
    "NodeClassifierConfig",
    "NodeNetwork",
    "Sample",
    "WeakStrongConfig",
    "WeakStrongNodes",
    "logits_of_some",
]
