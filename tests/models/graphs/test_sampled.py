"""Networks on drawn neighbours: with all of them as on the whole graph, with some of them right on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_moe.data.batches import ShuffledFeed
from dist_moe.data.graphs import Graph, NeighbourSampler, NodeTable
from dist_moe.models.graphs import NodeNetwork
from dist_moe.models.graphs.weak_strong import WeakStrongConfig
from dist_moe.models.moe_model import RunShape
from dist_moe.parallel import SingleWorld
from tests.models.graphs.test_networks import NAMES, built, graph


def directed() -> tuple[Tensor, Tensor]:
    """A graph with loops, repeated edges, and a node without any."""
    x_ND, edge_2E = graph()
    loops = torch.tensor([[3, 4, 4, 5, 6, 6], [3, 4, 4, 6, 5, 5]])
    return x_ND, torch.cat([edge_2E[:, ::2], loops], dim=1)


def loss_and_gradients(network: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Of the cross-entropy sum of nodes whose class is their place in the batch, modulo 3."""
    logit_BC = network(*inputs)
    logit_BC = logit_BC if isinstance(logit_BC, Tensor) else logit_BC.predictions[0]
    loss = torch.nn.functional.cross_entropy(logit_BC, torch.arange(len(logit_BC)) % 3, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [loss, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def sampled(graph: tuple[Tensor, Tensor], nodes: list[int], limit: int, step: int = 0) -> tuple[Any, ...]:
    """What a network takes: a sample of three hops around the nodes."""
    sample = NeighbourSampler(*graph, (limit,) * 3).sample(np.array(nodes), np.array([step]))
    return sample.x_ND, sample.edges, torch.arange(len(nodes))


@pytest.mark.parametrize("name", NAMES)
def test_all_neighbours_give_loss_and_gradients_of_the_whole_graph(name: str) -> None:
    nodes = [29, 4, 0, 17, 6]
    for layers in (1, 2, 3):
        network: Any = built(name, layers=layers, norm="layer", **({"skip": True} if name == "gcn" else {}))
        for whole in (graph(), directed()):
            ours = loss_and_gradients(network, sampled(whole, nodes, limit=30))
            theirs = loss_and_gradients(network, (*whole, torch.tensor(nodes)))
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_weak_and_strong_networks_share_a_sample() -> None:
    torch.manual_seed(0)
    config = WeakStrongConfig.model_validate({"strong": {"name": "graphsage", "dropout": 0.0}, "weak": {"dropout": 0}})
    model = config.build(8, 3, RunShape(SingleWorld(), 1)).double()
    ours = loss_and_gradients(model, sampled(graph(), [5, 2, 11], limit=30))
    for one, other in zip(ours, loss_and_gradients(model, (*graph(), torch.tensor([5, 2, 11]))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gcn", "graphsage", "gin"])
def test_a_layer_over_some_neighbours_is_right_on_average(name: str) -> None:
    """2000 equal stars, whose hub has nine neighbours, of which two are drawn; the layers are linear but for GIN's."""
    stars = 2000
    x_ND = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edge_2E = torch.stack([torch.arange(1, 10), torch.zeros(9, dtype=torch.int64)])
    edge_2E = torch.cat([edge_2E, edge_2E.flip(0)[:, ::2]], dim=1)
    network: Any = built(name, layers=1)
    if name == "gin":
        network.layers[0].nn = torch.nn.Identity()
        network.skips = torch.nn.ModuleList()
    whole = network(x_ND, edge_2E, torch.tensor([0]))
    edge_2E = (edge_2E.unsqueeze(1) + 10 * torch.arange(stars).unsqueeze(1)).flatten(1)
    drawn = network(*sampled((x_ND.repeat(stars, 1), edge_2E), list(range(0, 10 * stars, 10)), limit=2))
    error = (drawn.mean(0) - whole).abs() / (drawn.std(0) / stars**0.5)
    assert error.max() < 4
    assert drawn.std(0).min() > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_ranks_micro_batches_and_a_new_start_change_nothing(name: str) -> None:
    """The shares of a step add up to the step; a feed that begins with step 5 gives what one that came to it gives."""
    x_ND, edge_2E = graph()
    sampler = NeighbourSampler(x_ND, edge_2E, (1, 2))
    table = NodeTable(Graph(x_ND, edge_2E), np.arange(24), np.arange(24) % 3, sampler)
    network: NodeNetwork = built(name)

    def gradients(step: int, **layout: int) -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in network.parameters()]
        for rank in range(layout.get("world_size", 1)):
            for batch in ShuffledFeed(table, 8, seed=0, rank=rank, **layout).micro_batches(step):
                loss = torch.nn.functional.cross_entropy(network(*batch.inputs), batch.label_B, reduction="sum")
                for part, gradient in zip(total, torch.autograd.grad(loss, network.parameters()), strict=True):
                    part += gradient
        return total

    steps = [gradients(step) for step in range(6)]
    for layout in ({"world_size": 2}, {"world_size": 4, "accumulation": 2}):
        for one, other in zip(gradients(5, **layout), steps[5], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, gradients(5), steps[5]))
    assert not any(map(torch.equal, steps[4], steps[5]))
