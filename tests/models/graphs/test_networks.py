"""Networks of nodes against naive ones in fp64: a loop over nodes and their neighbours; rows alone; what is missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.data.graphs.splits import both_directions, undirected_pairs
from dist_moe.engine.trainable import hold_still
from dist_moe.errors import UserError
from dist_moe.models.graphs import NETWORKS, NodeNetwork, networks
from dist_moe.models.graphs.sparse import csr_features, dropout
from tests.data.graphs.tiny_graphs import tiny_graph

NAMES = ("mlp", "gcn", "graphsage", "gin", "gat")


def graph(nodes: int = 30, edges: int = 50) -> tuple[Tensor, Tensor]:
    """fp64 features and the edges in both directions; the last node has none."""
    tiny = tiny_graph(nodes=nodes, edges=edges)
    pair_2P = undirected_pairs(tiny.edge_2E[:, (tiny.edge_2E != nodes - 1).all(axis=0)])
    return torch.from_numpy(tiny.features_ND).double(), torch.from_numpy(both_directions(pair_2P))


def built(name: str, **fields: Any) -> NodeNetwork:
    torch.manual_seed(0)
    settings = NETWORKS.by_name[name].model_validate({"name": name, "hidden": 8, "dropout": 0.0} | fields)
    return settings.build(8, 3).double()


def naive_layer(network: NodeNetwork, i: int, h_ND: Tensor, edge_2E: Tensor) -> Tensor:
    """The rows of layer ``i``, node by node, by the papers' formulas."""
    layer: Any = network.layers[i]
    pairs = edge_2E.T.tolist()
    rows = []
    for v in range(len(h_ND)):
        neighbours = [u for u, w in pairs if w == v]
        degree = {u: 1 + sum(w == u for _, w in pairs) for u in (v, *neighbours)}
        if isinstance(layer, torch.nn.Linear):
            row = layer(h_ND[v])
        elif type(layer).__name__ == "GCNConv":
            mean = sum(h_ND[u] / (degree[u] * degree[v]) ** 0.5 for u in (v, *neighbours))
            row = mean @ layer.lin.weight.T + layer.bias
        elif type(layer).__name__ == "SAGEConv":
            mean = torch.stack([h_ND[u] for u in neighbours]).mean(0) if neighbours else torch.zeros_like(h_ND[v])
            row = layer.lin_l(mean) + layer.lin_r(h_ND[v])
        elif type(layer).__name__ == "GINConv":
            row = layer.nn(h_ND[v] + sum(h_ND[u] for u in neighbours))
        else:
            heads, width = layer.heads, layer.out_channels
            z = {u: (layer.lin.weight @ h_ND[u]).view(heads, width) for u in (v, *neighbours)}
            scores = torch.stack([(z[u] * layer.att_src[0]).sum(1) + (z[v] * layer.att_dst[0]).sum(1) for u in z])
            share = torch.nn.functional.leaky_relu(scores, 0.2).softmax(dim=0)
            mixed = sum(share[j, :, None] * z[u] for j, u in enumerate(z))
            row = (mixed.reshape(-1) if layer.concat else mixed.mean(0)) + layer.bias
        rows.append(row)
    result = torch.stack(rows)
    return result + network.skips[i](h_ND) if len(network.skips) else result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, {"layers": 3, "norm": "layer"}, {"layers": 1}, {"norm": "batch"}], ids=str)
def test_against_a_loop_over_nodes(name: str, fields: dict[str, Any]) -> None:
    network, (x_ND, edge_2E) = built(name, **fields), graph()
    node_B = torch.tensor([3, 29, 0, 3])
    x_ND.requires_grad_()
    given = network(x_ND, edge_2E, node_B)
    grads = torch.autograd.grad(given.square().sum(), [x_ND, *network.parameters()])
    network.train(True)
    for norm in network.norms:
        getattr(norm, "reset_running_stats", lambda: None)()
    h = x_ND
    for i in range(len(network.layers)):
        h = naive_layer(network, i, h, edge_2E)
        h = torch.relu(network.norms[i](h)) if i < len(network.norms) else h
    expected = torch.autograd.grad(h[node_B].square().sum(), [x_ND, *network.parameters()])
    assert torch.allclose(given, h[node_B], atol=1e-10)
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_beyond_its_hops_counts(name: str) -> None:
    network, (x_ND, edge_2E) = built(name).eval(), graph()
    node = torch.tensor([0])
    x_ND.requires_grad_()
    (grad_ND,) = torch.autograd.grad(network(x_ND, edge_2E, node).sum(), x_ND)
    reached = {0}
    for _ in range(network.hops):
        reached |= {u for u, v in edge_2E.T.tolist() if v in reached}
    touched = set(grad_ND.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched <= reached
    assert 0 < len(reached) < len(x_ND)


def test_gcn_notices_another_graph() -> None:
    network, (x_ND, edge_2E) = built("gcn").eval(), graph()
    nodes, other = torch.arange(30), edge_2E[:, ::3].clone()
    before, there = network(x_ND, edge_2E, nodes), network(x_ND, other, nodes)
    assert not torch.allclose(before, there)
    assert torch.equal(network(x_ND, edge_2E, nodes), before)


def test_gin_has_skips_unless_told_otherwise() -> None:
    assert len(built("gin").skips) == 2
    assert len(built("gin", skip=False).skips) == len(built("gcn").skips) == 0
    assert built("gat", heads=4).layers[0].heads == 4
    with pytest.raises(UserError, match="heads=3 of the network gat does not divide hidden=8"):
        built("gat", heads=3)


def test_without_torch_geometric_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    built("mlp")
    for name in NAMES[1:]:
        with pytest.raises(UserError, match=rf"network {name} is torch_geometric's: install the extra, pip install"):
            built(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("density", "fields"), [(0.02, {}), (0.1, {"norm": "batch"})], ids=str)
def test_features_that_are_mostly_0_against_a_loop(name: str, density: float, fields: dict[str, Any]) -> None:
    """With the larger density their sums over neighbours are no longer mostly 0."""
    network: Any = built(name, **fields) if name == "mlp" else built(name, skip=True, **fields)
    x_ND, edge_2E = graph()
    torch.manual_seed(2)
    x_ND = torch.where(torch.rand(x_ND.shape) < density, torch.rand(x_ND.shape).double(), 0.0)
    if name in ("graphsage", "gin"):  # loops and doubled edges, for which the other two have rules of their own
        edge_2E = torch.cat([edge_2E, edge_2E[:, :3], torch.tensor([[4], [4]])], dim=1)
    assert network.features(x_ND).layout == torch.sparse_csr
    node_B, parameters = torch.tensor([3, 29, 0, 3, 4]), list(network.parameters())
    given = network(x_ND, edge_2E, node_B)
    grads = torch.autograd.grad(given.square().sum(), parameters)
    h = x_ND
    for i in range(len(network.layers)):
        h = naive_layer(network, i, h, edge_2E)
        h = torch.relu(network.norms[i](h)) if i < len(network.norms) else h
    assert torch.allclose(given, h[node_B], atol=1e-10)
    expected = torch.autograd.grad(h[node_B].square().sum(), parameters)
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7 if name == "gcn" else 1e-9)  # PyG's weights of edges are fp32


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_edges_give_what_matrices_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, in bf16 and under autocast there are no CSR tensors."""
    network, (x_ND, edge_2E) = built(name), graph()
    nodes = torch.arange(30)
    ours = network(x_ND, edge_2E, nodes)
    monkeypatch.setattr(networks, "csr_pays", lambda x: False)
    assert torch.allclose(ours, network(x_ND, edge_2E, nodes))
    with torch.autocast("cpu"):
        assert torch.allclose(ours, network(x_ND, edge_2E, nodes).double(), atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_results_of_a_network_held_still_are_computed_once(name: str) -> None:
    model, (x_ND, edge_2E) = torch.nn.ModuleList([built(name, dropout=0.5), torch.nn.Linear(1, 1)]), graph()
    network: Any = model[0]
    expected = network.eval()(x_ND, edge_2E, torch.arange(30))
    calls: list[int] = []
    for module in network.layers[0].modules():
        module.register_forward_hook(lambda *_: calls.append(1))

    def same(nodes: list[int]) -> bool:
        return torch.allclose(network(x_ND, edge_2E, torch.tensor(nodes)), expected[nodes])

    with hold_still(model.train(), ["1.*"]):
        assert same([3, 5])
        once = len(calls)
        assert same([29, 0])
        assert len(calls) == once > 0
        for factor in (2, 0.5):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(factor)
            assert same([3, 5]) == (factor < 1)
        before, edge_2E = edge_2E, edge_2E[:, ::2].clone()
        assert same([3, 5, 29, 0]) == (name == "mlp")
        edge_2E = before
        x_ND[3] += 1
        assert not same([3, 5])
    assert not network.dropout or not same([5, 0])  # which trains now


@pytest.mark.parametrize("density", [0.0, 0.05, 0.9])
def test_dropout_of_features(density: float) -> None:
    """Entries are kept and scaled, or 0, with the share that is asked for, however many are 0 before."""
    torch.manual_seed(1)
    x_ND = torch.where(torch.rand(200, 300) < density, torch.rand(200, 300) + 1, 0.0)
    given_ND, share, there = csr_features(x_ND), 0.3, int((x_ND != 0).sum())
    assert (given_ND.layout == torch.sparse_csr) == (density < 0.125)
    y_ND = dropout(given_ND, share, training=True).to_dense()
    kept_ND = y_ND != 0
    assert torch.equal(given_ND.to_dense(), x_ND)
    torch.testing.assert_close(y_ND[kept_ND], x_ND[kept_ND] / (1 - share))
    deviation = (there * share * (1 - share)) ** 0.5
    assert abs(int(kept_ND.sum()) - there * (1 - share)) <= 4 * deviation
    assert torch.equal(dropout(given_ND, share, training=False).to_dense(), x_ND)
