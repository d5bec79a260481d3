"""Networks that give the nodes of a graph logits: an MLP on a node's own features, and PyG's convolutions.

A network is called with the features and edges of the whole graph and the nodes that are asked for. ``hops``: so many
edges away are the nodes that a result depends on; with these, and no others, it can be computed for some nodes alone.
In place of the whole graph a network takes a sample of it, whose nodes asked for come first (data.neighbours): each
layer follows the edges of one hop, the outermost first, and gives rows of that hop's targets alone.
To add one: derive from :class:`NetworkSettings` and register it in ``NETWORKS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.registry import Registry
from dist_moe.config.settings import LARGEST_DEPTH, Settings, Size
from dist_moe.errors import UserError
from dist_moe.models.graphs.sparse import Kept, csr_adjacency, csr_features, csr_pays, dense_if_filled, dropout, rows_at
from dist_moe.search.layers import is_held


class Hop(Protocol):
    """Edges into the first ``targets`` nodes of a sample, see :class:`dist_moe.data.graphs.SampledHop`."""

    edge_2E: Tensor
    scale_V: Tensor
    targets: int
    sources: int


class Sample(Protocol):
    """Edges of a sample, see :class:`dist_moe.data.graphs.SampledEdges`."""

    hops: tuple[Hop, ...]
    degree_S: Tensor


class NodeNetwork(nn.Module, ABC):
    """``network(x_ND, edge_2E, node_B)`` -> (B, C) logits of the nodes ``node_B``; a sample's edges may be given."""

    hops: int

    @abstractmethod
    def forward(self, x_ND: Tensor, edge_2E: Tensor | Sample, node_B: Tensor) -> Tensor:
        """Return logits of the nodes."""

    def features(self, x_ND: Tensor) -> Tensor:
        """Return the features of a graph as the layers take them."""
        return x_ND

    @abstractmethod
    def edges(self, edge_2E: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
        """Return the edges as the layers take them, and numbers of each edge, if any."""

    @abstractmethod
    def rows(self, x_ND: Tensor, *edges: Tensor) -> Tensor:
        """Return logits of all nodes of a graph, or of a part of one.

        Given are :meth:`features` and :meth:`edges`, or those within the part.
        """


class NetworkSettings(Settings, ABC):
    """The fields that every network has."""

    name: str
    layers: int = Field(2, ge=1, le=LARGEST_DEPTH, description="layers, the one of the logits among them")
    hidden: Size = Field(64, description="width between layers")
    dropout: float = Field(0.5, ge=0, lt=1, description="share of the inputs of each layer that is dropped")
    norm: Literal["none", "layer", "batch"] = Field(
        "none", description="what normalises between layers; 'batch' is over all nodes of the graph"
    )

    def widths(self, num_features: int, num_classes: int) -> list[int]:
        """Return the widths before, between and after the layers."""
        return [num_features, *[self.hidden] * (self.layers - 1), num_classes]

    @abstractmethod
    def build(self, num_features: int, num_classes: int) -> NodeNetwork:
        """Return the network. Raises UserError if what it needs is not installed."""


NETWORKS = Registry("network", NetworkSettings, default="gcn")

NetworkConfig = Annotated[SerializeAsAny[NetworkSettings], NETWORKS]
"""The type of a configuration field that holds any registered network."""


class Layers(NodeNetwork):
    """Layers with normalisation, ReLU and dropout between; ``layers`` take the rows, and edges if ``hops``.

    ``skips``: linear maps whose results are added to those of the layers, or none. What depends on the graph alone is
    kept for the graph of the last call, and the results with it while the network is held still.
    """

    def __init__(
        self, settings: NetworkSettings, layers: Sequence[nn.Module], skips: Sequence[nn.Module], hops: int
    ) -> None:
        super().__init__()
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        between: Any = norms[settings.norm]
        self.layers, self.skips = nn.ModuleList(layers), nn.ModuleList(skips)
        self.norms = nn.ModuleList(between(settings.hidden) for _ in layers[1:])
        self.dropout, self.hops = settings.dropout, hops
        self._of_rows = hops == 0 and settings.norm != "batch"
        self._features, self._edges, self._adjacency, self._results = Kept(), Kept(), Kept(), Kept()

    def forward(self, x_ND: Tensor, edge_2E: Tensor | Sample, node_B: Tensor) -> Tensor:
        """Return logits of the nodes; without neighbours and statistics, of their rows alone."""
        if not isinstance(edge_2E, Tensor):
            return self.rows(x_ND[node_B]) if self.hops == 0 else self._sampled_rows(x_ND, edge_2E)[node_B]
        if is_held(self) and not x_ND.requires_grad:
            weights = [*self.parameters(), *self.buffers()]
            return self._results.of([x_ND, edge_2E, *weights], partial(self._of_graph, x_ND, edge_2E))[node_B]
        if self._of_rows or (self.hops == 0 and not self.training):
            return self.rows(rows_at(self.features(x_ND), node_B))
        return self._of_graph(x_ND, edge_2E)[node_B]

    def features(self, x_ND: Tensor) -> Tensor:
        """Return the features of a graph as layers take them, in CSR if that is shorter; computed once for a graph."""
        return self._features.of([x_ND], partial(csr_features, x_ND))

    def _of_graph(self, x_ND: Tensor, edge_2E: Tensor) -> Tensor:
        return self.rows(self.features(x_ND), *self.edges(edge_2E, len(x_ND)))

    def rows(self, x_ND: Tensor, *edges: Tensor) -> Tensor:
        """Return logits of all rows."""
        adjacency_NN = None
        if csr_pays(x_ND):
            adjacency_NN = self._adjacency.of([x_ND, *edges], partial(self.adjacency, x_ND, *edges))
        h = x_ND
        for i, layer in enumerate(self.layers):
            h = dropout(h, self.dropout, self.training)
            result = layer(h, *edges) if adjacency_NN is None else self.of_adjacency(i, h, adjacency_NN)
            h = self._after(i, result, h)
        return h

    def adjacency(self, x_ND: Tensor, *edges: Tensor) -> Tensor | None:
        """Return the (N, N) matrix, in CSR, by which layers sum rows over edges; None: they take the edges."""
        return None

    def of_adjacency(self, i: int, h_ND: Tensor, adjacency_NN: Tensor) -> Tensor:
        """Return the results of layer ``i`` by that matrix."""
        result: Tensor = self.layers[i](h_ND, adjacency_NN)
        return result

    def _sampled_rows(self, x_SD: Tensor, sample: Sample) -> Tensor:
        hops = sample.hops[: self.hops]
        h = x_SD[: hops[-1].sources]
        for i, hop in enumerate(reversed(hops)):
            h = dropout(h, self.dropout, self.training)
            h = self._after(i, self.of_hop(i, h, hop, sample.degree_S), h[: hop.targets])
        return h

    def of_hop(self, i: int, h_SD: Tensor, hop: Hop, degree_S: Tensor) -> Tensor:
        """Return the results of layer ``i`` for the targets of a hop, given the rows of its sources."""
        result: Tensor = self.layers[i]((h_SD, h_SD[: hop.targets]), hop.edge_2E)
        return result

    def _after(self, i: int, result: Tensor, own: Tensor) -> Tensor:
        """Return a layer's results after skip, normalisation and ReLU. ``own``: the layer's input of the same rows."""
        h = result + self.skips[i](own) if len(self.skips) else result
        return F.relu(self.norms[i](h)) if i < len(self.norms) else h

    def edges(self, edge_2E: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
        """Return what the layers take beside the rows."""
        return (edge_2E,) if self.hops else ()


class WeightedLayers(Layers):
    """Layers of GCN: their edges carry the weights of the symmetric normalisation.

    The weights come from the degrees in the whole graph: a part of it is computed by the weights of its edges, see
    :func:`~dist_moe.models.graphs.weak_strong.logits_of_some`.
    """

    def edges(self, edge_2E: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
        """Return edges with self-loops, and their weights."""
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        edges: tuple[Tensor, ...] = self._edges.of([edge_2E], lambda: gcn_norm(edge_2E, num_nodes=num_nodes))
        return edges

    def adjacency(self, x_ND: Tensor, *edges: Tensor) -> Tensor:
        """Return the normalised matrix with self-loops."""
        edge_2E, weight_E = edges
        return csr_adjacency(edge_2E, weight_E.to(x_ND.dtype), len(x_ND))

    def of_hop(self, i: int, h_SD: Tensor, hop: Hop, degree_S: Tensor) -> Tensor:
        """Return the results for the targets: weights by degrees in the whole graph, sums scaled up to all edges."""
        edge_2E = hop.edge_2E[:, hop.edge_2E[0] != hop.edge_2E[1]]  # a node's own row has a weight in any case
        loop_V = torch.arange(hop.targets, device=edge_2E.device)
        root_S = (1.0 + degree_S).pow(-0.5)
        weight_E = root_S[edge_2E].prod(dim=0) * hop.scale_V[edge_2E[1]]
        edge_2E = torch.cat([edge_2E, loop_V.expand(2, -1)], dim=1)
        result: Tensor = self.layers[i](h_SD, edge_2E, torch.cat([weight_E, root_S[loop_V].square()]))
        return result[: hop.targets]


class AveragingLayers(Layers):
    """Layers of GraphSAGE: means over neighbours."""

    def adjacency(self, x_ND: Tensor, *edges: Tensor) -> Tensor:
        """Return the matrix of means."""
        (edge_2E,) = edges
        degree_N = torch.bincount(edge_2E[1], minlength=len(x_ND)).to(x_ND.dtype)
        return csr_adjacency(edge_2E, 1 / degree_N[edge_2E[1]], len(x_ND))

    def of_adjacency(self, i: int, h_ND: Tensor, adjacency_NN: Tensor) -> Tensor:
        """Return (A h) W_l + b + h W_r."""
        layer: Any = self.layers[i]
        h_ND = dense_if_filled(h_ND, adjacency_NN)
        result: Tensor = layer.lin_l(adjacency_NN @ h_ND) + layer.lin_r(h_ND)
        return result


class SummingLayers(Layers):
    """Layers of GIN: sums over neighbours, of drawn ones scaled up to all of them."""

    def adjacency(self, x_ND: Tensor, *edges: Tensor) -> Tensor:
        """Return the matrix of sums."""
        (edge_2E,) = edges
        return csr_adjacency(edge_2E, torch.ones(edge_2E.shape[1], dtype=x_ND.dtype), len(x_ND))

    def of_adjacency(self, i: int, h_ND: Tensor, adjacency_NN: Tensor) -> Tensor:
        """Return MLP(h + A h); epsilon is 0."""
        layer: Any = self.layers[i]
        h_ND = dense_if_filled(h_ND, adjacency_NN)
        result: Tensor = layer.nn(h_ND + adjacency_NN @ h_ND)
        return result

    def of_hop(self, i: int, h_SD: Tensor, hop: Hop, degree_S: Tensor) -> Tensor:
        """Return the results for the targets."""
        layer: Any = self.layers[i]
        own_VD = h_SD[: hop.targets]
        sum_VD = layer.propagate(hop.edge_2E, x=(h_SD, own_VD), size=(len(h_SD), hop.targets))
        result: Tensor = layer.nn((1 + layer.eps) * own_VD + hop.scale_V.unsqueeze(1).to(h_SD.dtype) * sum_VD)
        return result


class MLPConfig(NetworkSettings):
    """Dense layers on a node's own features."""

    name: Literal["mlp"] = Field("mlp", description="which network this is")

    def build(self, num_features: int, num_classes: int) -> NodeNetwork:
        """Return the network."""
        widths = self.widths(num_features, num_classes)
        return Layers(self, [nn.Linear(*pair) for pair in pairwise(widths)], [], hops=0)


class ConvNetworkSettings(NetworkSettings):
    """The fields of networks of PyG's convolutions. ``layers_type``: what takes rows and edges."""

    layers_type: ClassVar[type[Layers]] = Layers

    skip: bool = Field(False, description="add a linear map of its input to the result of each layer")

    def build(self, num_features: int, num_classes: int) -> NodeNetwork:
        """Return the network. Raises UserError where torch_geometric is not installed."""
        try:
            import torch_geometric.nn as pyg
        except ImportError as error:
            raise UserError(
                f"model: the network {self.name} is torch_geometric's: install the extra, "
                "pip install 'comet-dist-moe[graphs]', or use the network mlp"
            ) from error
        pairs = list(pairwise(self.widths(num_features, num_classes)))
        layers = [self.layer(pyg, *pair, is_last=i == self.layers - 1) for i, pair in enumerate(pairs)]
        skips = [nn.Linear(*pair) for pair in pairs] if self.skip else []
        return self.layers_type(self, layers, skips, hops=self.layers)

    @abstractmethod
    def layer(self, pyg: Any, width_in: int, width_out: int, is_last: bool) -> nn.Module:
        """Return a layer of ``pyg``, the module torch_geometric.nn."""


class GCNConfig(ConvNetworkSettings):
    """Graph convolutions (Kipf and Welling 2017)."""

    layers_type: ClassVar[type[Layers]] = WeightedLayers

    name: Literal["gcn"] = Field("gcn", description="which network this is")

    def layer(self, pyg: Any, width_in: int, width_out: int, is_last: bool) -> nn.Module:
        """Return a GCNConv that takes its weights with the edges."""
        layer: nn.Module = pyg.GCNConv(width_in, width_out, normalize=False)
        return layer


class GraphSAGEConfig(ConvNetworkSettings):
    """Means over neighbours beside a node's own row (Hamilton et al. 2017)."""

    layers_type: ClassVar[type[Layers]] = AveragingLayers

    name: Literal["graphsage"] = Field("graphsage", description="which network this is")

    def layer(self, pyg: Any, width_in: int, width_out: int, is_last: bool) -> nn.Module:
        """Return a SAGEConv."""
        layer: nn.Module = pyg.SAGEConv(width_in, width_out)
        return layer


class GINConfig(ConvNetworkSettings):
    """Sums over neighbours through an MLP (Xu et al. 2019), with skips by default, as Mowst has it."""

    layers_type: ClassVar[type[Layers]] = SummingLayers

    name: Literal["gin"] = Field("gin", description="which network this is")
    skip: bool = Field(True, description="add a linear map of its input to the result of each layer")

    def layer(self, pyg: Any, width_in: int, width_out: int, is_last: bool) -> nn.Module:
        """Return a GINConv over an MLP of two layers."""
        inner = nn.Sequential(nn.Linear(width_in, self.hidden), nn.ReLU(), nn.Linear(self.hidden, width_out))
        layer: nn.Module = pyg.GINConv(inner)
        return layer


class GATConfig(ConvNetworkSettings):
    """Attention over neighbours (Velickovic et al. 2018)."""

    name: Literal["gat"] = Field("gat", description="which network this is")
    heads: int = Field(8, ge=1, le=LARGEST_DEPTH, description="heads of each layer; of the last, their mean counts")

    def layer(self, pyg: Any, width_in: int, width_out: int, is_last: bool) -> nn.Module:
        """Return a GATConv. Raises UserError if the heads do not divide the width."""
        if not is_last and width_out % self.heads:
            raise UserError(f"model: heads={self.heads} of the network gat does not divide hidden={self.hidden}")
        width = width_out if is_last else width_out // self.heads
        layer: nn.Module = pyg.GATConv(width_in, width, heads=self.heads, concat=not is_last)
        return layer


for _settings in (MLPConfig, GCNConfig, GraphSAGEConfig, GINConfig, GATConfig):
    NETWORKS.register(_settings)
