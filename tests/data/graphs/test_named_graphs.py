"""Published graphs in their files' formats, on small ones of our own making; the real ones with the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.data.graphs import NamedGraphConfig, NodeGraph
from dist_moe.data.graphs.splits import homophily, planetoid_split, random_split, rewire
from dist_moe.errors import UserError
from tests.data.graphs.tiny_graphs import tiny_graph, write_planetoid, write_tiny_cora, write_wordnet


def opened(name: str, root: Path | None, cache: Path, **fields: Any) -> NodeGraph:
    given = {} if root is None else {"root": str(root)}
    return NamedGraphConfig(name=name, cache=str(cache), **given, **fields).prepare(progress=False)


def test_cora(tmp_path: Path) -> None:
    graph, tiny = opened("cora", write_tiny_cora(tmp_path / "cora"), tmp_path / "c", split="random"), tiny_graph()
    x_ND = torch.from_numpy(tiny.features_ND)
    assert torch.allclose(graph.graph.x_ND, x_ND / x_ND.sum(dim=1, keepdim=True))
    assert graph.graph.edge_2E.shape == (2, 200)
    assert graph.train.label_N.tolist() == tiny.label_N[graph.train.node_N].tolist()
    with pytest.raises(UserError, match=r"data\.split=official: data\.name=cora has no split"):
        opened("cora", tmp_path / "cora", tmp_path / "c", split="official")
    (tmp_path / "cora" / "cora.cites").write_text("paper1 nowhere\n")
    with pytest.raises(UserError, match="are not as LINQS has them: KeyError"):
        opened("cora", tmp_path / "cora", tmp_path / "c", split="random")


def test_planetoid_with_its_split_and_its_gap(tmp_path: Path) -> None:
    tiny = write_planetoid(tmp_path / "files")
    graph = opened("citeseer", tmp_path / "files", tmp_path / "c", normalise=False)
    assert graph.train.node_N.tolist() == list(range(6))
    assert graph.val.node_N.tolist() == list(range(6, 506))
    assert graph.test.node_N.tolist() == [node for node in range(520, 530) if node != 523]
    known = np.arange(530) != 523
    assert graph.graph.x_ND.numpy()[known].tolist() == tiny.features_ND[known].tolist()
    assert not graph.graph.x_ND[523].any()
    assert 523 not in graph.graph.edge_2E
    assert graph.test.label_N.tolist() == tiny.label_N[graph.test.node_N].tolist()
    pairs = {(a, b) for a, b in tiny.edge_2E.T.tolist() if 523 not in (a, b)}
    assert {(min(a, b), max(a, b)) for a, b in graph.graph.edge_2E.T.tolist()} == pairs
    (tmp_path / "files" / "ind.citeseer.graph").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"ind\.citeseer\.graph is not as Planetoid has it: .*os\.system"):
        opened("citeseer", tmp_path / "files", tmp_path / "c")


def test_wordnet(tmp_path: Path) -> None:
    settings = {"split": "random", "normalise": False}
    graph = opened("wordnet", write_wordnet(tmp_path / "dict"), tmp_path / "c", **settings)
    edges = {(int(a), int(b)) for a, b in graph.graph.edge_2E.T if a < b}
    assert edges == {(0, 1), (0, 2), (3, 4), (3, 5)}  # dog-animal, dog-bark, loud-noisy, loud-loudly
    labels = {
        int(n): int(y) for t in (graph.train, graph.val, graph.test) for n, y in zip(t.node_N, t.label_N, strict=True)
    }
    assert labels == {0: 5, 1: 3, 2: 32, 3: 0, 4: 0, 5: 2}
    assert graph.graph.x_ND[3].tolist() == graph.graph.x_ND[4].tolist()


def test_splits_are_disjoint_seeded_and_of_their_sizes() -> None:
    label_N = np.random.default_rng(0).integers(-1, 7, 3000)
    for split in (planetoid_split, random_split):
        one, again, other = (split(label_N, seed) for seed in (0, 0, 1))
        nodes = np.concatenate(list(one.values()))
        assert len(np.unique(nodes)) == len(nodes)
        assert (label_N[nodes] >= 0).all()
        assert all(one[part].tolist() == again[part].tolist() != other[part].tolist() for part in one)
    counts = np.bincount(label_N[planetoid_split(label_N, 0)["train"]])
    assert counts.tolist() == [20] * 7
    assert [len(nodes) for nodes in planetoid_split(label_N, 0).values()] == [140, 500, 1000]
    assert sum(map(len, random_split(label_N, 0).values())) == (label_N >= 0).sum()


def test_rewiring_moves_targets_only_and_homophily_falls() -> None:
    tiny = tiny_graph(nodes=600, edges=2000)
    shares = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        changed = rewire(tiny.edge_2E, share, 600, seed=3)
        assert (changed[0] == tiny.edge_2E[0]).all()
        assert (changed[0] != changed[1]).all()
        assert (changed[1] != tiny.edge_2E[1]).mean() == pytest.approx(share, abs=0.01)
        shares.append(homophily(changed, tiny.label_N))
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(1 / 3, abs=0.05)
    assert (rewire(tiny.edge_2E, 0.5, 600, 3) == rewire(tiny.edge_2E, 0.5, 600, 3)).all()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts", "homophilous"),
    [
        ("cora", (2708, 10_556, 1433, 7, 140, 500, 1000), 0.81),
        ("citeseer", (3327, 9104, 3703, 6, 120, 500, 1000), 0.74),
        ("pubmed", (19_717, 88_648, 500, 3, 60, 500, 1000), 0.80),
        ("wordnet", (117_659, 367_578, 512, 45, 900, 500, 1000), 0.71),
    ],
)
def test_the_real_ones(tmp_path: Path, name: str, counts: tuple[int, ...], homophilous: float) -> None:
    manifest = opened(name, None, tmp_path).manifest
    assert tuple(manifest["counts"].values()) == counts
    assert manifest["homophily"] == pytest.approx(homophilous, abs=0.01)
