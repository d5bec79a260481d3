"""A step over a whole graph, forward and backward: PyG's layers on dense features and a list of edges, over ours.

    python -m tools.bench.graphs --report results/bench_graphs.md

Both have the same weights; without dropout their gradients must be equal before anything is timed, with a dropout of
.5. Candidates take turns; what is written are ratios of the processor's time within a round, median and quartiles.
The graphs are those of ``dist-moe data fetch NAME``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.models.graphs import NETWORKS
from dist_moe.tasks.graphs import NamedGraphSettings
from tools.bench.timing import Spread, interleaved, ratio
from tools.studies import machine

NAMES = ("mlp", "gcn", "graphsage", "gin")
HIDDEN, DROPOUT = 64, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", default=["cora", "citeseer", "pubmed", "wordnet"], metavar="NAME")
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for graph in options.graphs:
        rows.append([graph, *(shown(measure(graph, name, options.repetitions)) for name in options.networks)])
        print(" | ".join(rows[-1]), flush=True)
    if options.report is not None:
        options.report.write_text(page(rows, options), encoding="utf-8")


def measure(graph: str, name: str, repetitions: int) -> Spread:
    """Return how often the time of ours PyG's takes."""
    data = NamedGraphSettings.model_validate({"name": graph, "split": "random"}).prepare(progress=False)
    x_ND, edge_2E = data.graph.x_ND, data.graph.edge_2E
    node_B, label_B = torch.from_numpy(data.train.node_N), torch.from_numpy(data.train.label_N)
    torch.manual_seed(0)
    settings = NETWORKS.by_name[name].model_validate({"name": name, "hidden": HIDDEN, "dropout": DROPOUT})
    network: Any = settings.build(x_ND.shape[1], data.num_classes)

    def step(rows: Callable[[], Tensor]) -> list[Tensor]:
        loss = F.cross_entropy(rows(), label_B)
        return list(torch.autograd.grad(loss, list(network.parameters())))

    ways = {
        "ours": partial(step, lambda: network(x_ND, edge_2E, node_B)),
        "lists": partial(step, lambda: by_lists(network, x_ND, edge_2E, node_B)),
    }
    network.eval()
    for one, other in zip(*(way() for way in ways.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    network.train()
    seconds = interleaved(ways, repetitions, clock="cpu")
    return ratio(seconds["lists"], seconds["ours"])


def by_lists(network: Any, x_ND: Tensor, edge_2E: Tensor, node_B: Tensor) -> Tensor:
    """Return the logits as PyG's examples compute them; of an MLP for the nodes alone, of GCN with weights kept."""
    h, edges = (x_ND, network.edges(edge_2E, len(x_ND))) if network.hops else (x_ND[node_B], ())
    for i, layer in enumerate(network.layers):
        h = F.dropout(h, DROPOUT, network.training)
        result = layer(h, *edges)
        result = result + network.skips[i](h) if len(network.skips) else result
        h = result.relu() if i < len(network.layers) - 1 else result
    return h[node_B] if network.hops else h


def shown(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})"


def page(rows: Sequence[Sequence[str]], options: argparse.Namespace) -> str:
    """Return the report."""
    lines = [
        "# A step over a whole graph: PyG's layers on dense features and lists of edges, over ours",
        "",
        f"`python -m tools.bench.graphs --graphs {' '.join(options.graphs)} --networks {' '.join(options.networks)} "
        f"--repetitions {options.repetitions}`, seed 0: processor time of PyG's way over that of ours, median and "
        f"quartiles of {options.repetitions} rounds by turns, one thread; two layers, {HIDDEN} wide, dropout "
        f"{DROPOUT}, random split. {machine()}.",
        "",
        f"| graph | {' | '.join(options.networks)} |",
        f"|{' --- |' * (1 + len(options.networks))}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
