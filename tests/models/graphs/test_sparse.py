"""Sparse inference is full inference: on the neighbourhood of some nodes alone, and on nothing beyond it."""

from __future__ import annotations

import pytest
import torch

from dist_moe.models.graphs import logits_of_some
from dist_moe.models.graphs.weak_strong import WeakStrongConfig
from dist_moe.models.moe_model import RunShape
from dist_moe.parallel import SingleWorld
from tests.models.graphs.test_networks import NAMES, built, graph


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_equals_a_pass_over_the_whole_graph(name: str, layers: int) -> None:
    network, (x_ND, edge_2E) = built(name, layers=layers, norm="batch").eval(), graph(60, 50)
    for nodes in ([59], [0], [5, 3, 40], list(range(60)), []):
        node_B = torch.tensor(nodes, dtype=torch.int64)
        assert torch.allclose(logits_of_some(network, x_ND, edge_2E, node_B), network(x_ND, edge_2E, node_B))


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beyond_is_not_read(name: str) -> None:
    network, (x_ND, edge_2E) = built(name).eval(), graph(60, 50)
    near = {7}
    for _ in range(network.hops):
        near |= {u for u, v in edge_2E.T.tolist() if v in near}
    expected = network(x_ND, edge_2E, torch.tensor([7]))
    x_ND[[node for node in range(60) if node not in near]] = torch.nan
    assert 0 < len(near) < 60
    assert torch.allclose(logits_of_some(network, x_ND, edge_2E, torch.tensor([7])), expected)


@pytest.mark.parametrize("strong", NAMES[1:])
def test_classes_by_threshold_are_those_of_both_networks(strong: str) -> None:
    torch.manual_seed(0)
    config = WeakStrongConfig(strong={"name": strong, "hidden": 8}, confidence={"name": "random"})  # type: ignore[arg-type]
    model = config.build(8, 3, RunShape(SingleWorld(), 1)).double().eval()
    x_ND, edge_2E = graph(60, 50)
    x_ND = x_ND + 0.1 * torch.rand(x_ND.shape)  # else equal rows have equal confidences
    node_B = torch.arange(0, 60, 2)
    output = model(x_ND, edge_2E, node_B)
    shares = []
    for threshold in (0.0, 0.3, 0.7, 2.0):
        class_B, asks_B = model.classify(x_ND, edge_2E, node_B, threshold)
        assert torch.equal(asks_B, output.confidence_B < threshold)
        expected = torch.where(asks_B, output.strong_BC.argmax(1), output.weak_BC.argmax(1))
        assert torch.equal(class_B, expected)
        shares.append(float(asks_B.double().mean()))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
