"""Graphs whose nodes are to be classified: published ones, and the user's own.

`GraphSettings.prepare` gives the `NodeGraph`: features, edges, labels, and the nodes of each part.
"""

from dist_moe.data.graphs.graph import Graph, NodeBatch, NodeGraph, NodeTable
from dist_moe.data.graphs.sampling import NeighbourSampler, SampledEdges, SampledGraph, SampledHop
from dist_moe.data.graphs.settings import GraphSettings, NamedGraphConfig, OwnGraphConfig

__all__ = [
    "Graph",
    "GraphSettings",
    "NamedGraphConfig",
    "NeighbourSampler",
    "NodeBatch",
    "NodeGraph",
    "NodeTable",
    "OwnGraphConfig",
    "SampledEdges",
    "SampledGraph",
    "SampledHop",
]
