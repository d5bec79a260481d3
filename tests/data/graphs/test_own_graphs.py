"""The user's own graphs: every layout gives the same graph, and what is wrong is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.data.graphs import NodeGraph, OwnGraphConfig
from dist_moe.errors import UserError
from tests.data.graphs.tiny_graphs import (
    PARTS,
    tiny_graph,
    write_csv,
    write_graphsaint,
    write_npz,
    write_ogb,
    write_pyg,
)

LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "pyg": ("graph.pt", write_pyg),
    "npz": ("graph.npz", write_npz),
    "csv": ("graph", write_csv),
    "flickr": ("flickr", write_graphsaint),
    "ogb": ("arxiv", write_ogb),
}


def opened(root: Path, **fields: Any) -> NodeGraph:
    cache = root.parent / "cache"
    return OwnGraphConfig(name="graph", root=str(root), cache=str(cache), **fields).prepare(progress=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_graph(tmp_path: Path, layout: str) -> None:
    name, write = LAYOUTS[layout]
    graph, tiny = opened(write(tmp_path / name)), tiny_graph()
    assert torch.equal(graph.graph.x_ND, torch.from_numpy(tiny.features_ND))
    pairs = {(int(a), int(b)) for a, b in tiny.edge_2E.T}
    assert {(int(a), int(b)) for a, b in graph.graph.edge_2E.T} == pairs | {(b, a) for a, b in pairs}
    for part in PARTS:
        table = getattr(graph, part)
        assert table.node_N.tolist() == np.flatnonzero(tiny.masks[part]).tolist()
        assert table.label_N.tolist() == tiny.label_N[tiny.masks[part]].tolist()
    assert graph.num_classes == 3
    assert graph.manifest["source"]["sha256"]


def test_directed_edges_stay_as_they_are(tmp_path: Path) -> None:
    graph = opened(write_npz(tmp_path / "graph.npz"), directed=True)
    assert graph.graph.edge_2E.numpy().tolist() == tiny_graph().edge_2E.tolist()


def test_a_changed_file_is_another_graph(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "graph.npz")
    before = opened(path)
    write_npz(path, tiny_graph(seed=1))
    assert not torch.equal(before.graph.x_ND, opened(path).graph.x_ND)


def test_nodes_without_a_label_are_in_no_part(tmp_path: Path) -> None:
    label_N = tiny_graph().label_N.astype(np.float64)
    label_N[:10] = np.nan
    graph = opened(write_npz(tmp_path / "graph.npz", labels=label_N[:, None]))
    assert min(min(getattr(graph, part).node_N) for part in PARTS) == 10
    assert sum(len(getattr(graph, part)) for part in PARTS) == 50


TINY = tiny_graph()
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no edges": ({"edges": None}, "has no edges; it has features, labels, test_mask, train_mask, val_mask"),
    "edges on their side": ({"edges": TINY.edge_2E.T}, r"the edges are int64 \[100, 2\]. Remedy: give whole numbers"),
    "node beyond": ({"edges": TINY.edge_2E + 30}, r"an edge has node \d+, and there are 60 nodes"),
    "node below": ({"edges": TINY.edge_2E - 30}, r"an edge has node -\d+, and there are 60 nodes"),
    "labels too few": ({"labels": TINY.label_N[:-1]}, r"the labels are int64 \[59\]. Remedy: give a class"),
    "half a class": ({"labels": TINY.label_N + 0.5}, "a label is no class"),
    "below none": ({"labels": TINY.label_N - 2}, "a label is no class"),
    "one class": ({"labels": 0 * TINY.label_N}, r"the labels have 1 class\(es\)"),
    "not finite": ({"features": np.where(TINY.features_ND > 0, np.inf, 0)}, "the features are float64 .* or not"),
    "words": ({"features": TINY.features_ND.astype(str)}, "the features are <U"),
    "no mask": ({"val_mask": None}, "val_mask is not there"),
    "numbers as mask": ({"val_mask": TINY.masks["val"].astype(int)}, r"val_mask is int64 \[60\]"),
    "longer mask": ({"val_mask": np.ones(70, dtype=bool)}, "the nodes of val are beyond the 60"),
    "twice": ({"val_mask": TINY.masks["train"]}, "a node is in two of train, val and test"),
    "objects": ({"labels": np.array([{}], dtype=object)}, "cannot be read: Object arrays"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    changes, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        opened(write_npz(tmp_path / "graph.npz", **changes))


def test_no_split_and_none_that_can_be_drawn(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "graph.npz", train_mask=None, val_mask=None, test_mask=None)
    with pytest.raises(UserError, match=r"data\.split=official: data.name=graph has no split; use planetoid or random"):
        opened(path, split="official")
    with pytest.raises(UserError, match=r"data\.split=planetoid needs 1,500 labelled nodes .* use data.split=random"):
        opened(path)
    assert [len(getattr(opened(path, split="random"), part)) for part in PARTS] == [36, 12, 12]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, (77,))


def test_no_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"is no saved PyG Data of tensors: .* Remedy: torch.save"):
        opened(tmp_path / "evil.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="is no saved PyG Data"):
        opened(tmp_path / "torn.pt")


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=f"data.root={path} holds no graph that is known. Remedy: give a saved PyG"):
            opened(path)
    root = write_csv(tmp_path / "csv")
    (root / "masks.csv").write_text("train\nother\n")
    with pytest.raises(UserError, match=r"masks.csv has 'other'. Remedy"):
        opened(root)
    (root / "masks.csv").unlink()
    (root / "labels.csv").write_text("label\n0\n")
    with pytest.raises(UserError, match=r"labels.csv has a cell that is no number: .*'label'.* no header"):
        opened(root)
    root = write_graphsaint(tmp_path / "flickr")
    (root / "role.json").write_text('{"tr": [0]}')
    with pytest.raises(UserError, match=r"flickr is not as GraphSAINT has it: KeyError"):
        opened(root)
    root = write_ogb(tmp_path / "arxiv")
    (root / "split" / "other").mkdir()
    with pytest.raises(UserError, match=r"has 2 directories. Remedy: leave the one that is meant"):
        opened(root)


def test_without_torch_geometric_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyg(tmp_path / "graph.pt")
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(UserError, match=r"install the extra, pip install 'comet-dist-moe\[graphs\]'"):
        opened(path)
