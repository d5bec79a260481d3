"""Small graphs of our own making, in the layouts in which graphs are published or saved."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Tiny:
    """Nodes whose neighbours are mostly of their class, and whose features tell it less well."""

    features_ND: NDArray[Any]
    edge_2E: NDArray[np.int64]
    label_N: NDArray[np.int64]
    masks: dict[str, NDArray[np.bool_]]


def tiny_graph(nodes: int = 60, classes: int = 3, features: int = 8, seed: int = 0, edges: int = 100) -> Tiny:
    """``edges`` different pairs of two nodes; half the nodes train, a quarter each validates and tests."""
    rng = np.random.default_rng(seed)
    label_N = np.arange(nodes) % classes
    features_ND = (rng.random((nodes, features)) < 0.3).astype(np.float32)
    features_ND[np.arange(nodes), np.where(rng.random(nodes) < 0.7, label_N, rng.integers(classes, size=nodes))] = 1.0
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < edges:
        one, other = rng.integers(nodes, size=2)
        if one != other and (label_N[one] == label_N[other] or rng.random() < 0.1):
            pairs.add((min(one, other), max(one, other)))
    part_N = rng.permutation(np.repeat([0, 0, 1, 2], -(-nodes // 4))[:nodes])
    masks = {part: part_N == i for i, part in enumerate(PARTS)}
    return Tiny(features_ND, np.array(sorted(pairs), dtype=np.int64).T, label_N, masks)


def write_pyg(path: Path, tiny: Tiny | None = None) -> Path:
    import torch
    from torch_geometric.data import Data

    tiny = tiny or tiny_graph()
    x, edges, y = map(torch.from_numpy, (tiny.features_ND, tiny.edge_2E, tiny.label_N))
    masks = {f"{part}_mask": torch.from_numpy(mask) for part, mask in tiny.masks.items()}
    torch.save(Data(x=x, edge_index=edges, y=y, **masks), path)
    return path


def write_npz(path: Path, tiny: Tiny | None = None, **changes: Any) -> Path:
    tiny = tiny or tiny_graph()
    arrays: dict[str, Any] = {"features": tiny.features_ND, "edges": tiny.edge_2E, "labels": tiny.label_N}
    arrays |= {f"{part}_mask": mask for part, mask in tiny.masks.items()} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_csv(root: Path, tiny: Tiny | None = None) -> Path:
    tiny = tiny or tiny_graph()
    root.mkdir(parents=True)
    for name, array in (("features", tiny.features_ND), ("edges", tiny.edge_2E.T), ("labels", tiny.label_N[:, None])):
        (root / f"{name}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in array.tolist()))
    words = [next(part for part in PARTS if tiny.masks[part][node]) for node in range(len(tiny.label_N))]
    (root / "masks.csv").write_text("\n".join(words) + "\n")
    return root


def write_graphsaint(root: Path, tiny: Tiny | None = None) -> Path:
    tiny = tiny or tiny_graph()
    root.mkdir(parents=True)
    count = len(tiny.label_N)
    adj = csr_matrix((np.ones(tiny.edge_2E.shape[1]), tuple(tiny.edge_2E)), shape=(count, count))
    np.savez(root / "adj_full.npz", data=adj.data, indices=adj.indices, indptr=adj.indptr, shape=adj.shape)
    np.save(root / "feats.npy", tiny.features_ND)
    (root / "class_map.json").write_text(json.dumps({str(i): int(label) for i, label in enumerate(tiny.label_N)}))
    roles = {
        role: np.flatnonzero(tiny.masks[part]).tolist() for role, part in zip(("tr", "va", "te"), PARTS, strict=True)
    }
    (root / "role.json").write_text(json.dumps(roles))
    return root


def write_ogb(root: Path, tiny: Tiny | None = None) -> Path:
    tiny = tiny or tiny_graph()
    tables = {"raw/node-feat": tiny.features_ND, "raw/edge": tiny.edge_2E.T, "raw/node-label": tiny.label_N[:, None]}
    names = {"train": "train", "val": "valid", "test": "test"}
    tables |= {f"split/time/{names[part]}": np.flatnonzero(mask)[:, None] for part, mask in tiny.masks.items()}
    for name, array in tables.items():
        path = root / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(",".join(map(str, row)) + "\n" for row in array.tolist()).encode()))
    return root


def write_tiny_cora(root: Path, tiny: Tiny | None = None) -> Path:
    tiny = tiny or tiny_graph()
    root.mkdir(parents=True, exist_ok=True)
    rows = zip(tiny.features_ND.astype(int).tolist(), tiny.label_N, strict=True)
    content = [f"paper{i} {' '.join(map(str, row))} Class_{label}" for i, (row, label) in enumerate(rows)]
    (root / "cora.content").write_text("\n".join(content) + "\n")
    cites = [f"paper{cited} paper{citing}" for citing, cited in tiny.edge_2E.T]
    (root / "cora.cites").write_text("\n".join(cites) + "\n")
    return root


def write_planetoid(root: Path, name: str = "citeseer", train: int = 6, known: int = 520, left_out: int = 523) -> Tiny:
    """Planetoid's eight files of 530 nodes, of which ``test.index`` leaves one out."""
    tiny = tiny_graph(nodes=530, edges=900)
    one_hot = np.eye(3, dtype=np.int32)[tiny.label_N]
    test = np.array([node for node in range(known, 530) if node != left_out])[::-1]
    links = defaultdict(list, {node: [] for node in range(530)})
    for source, target in tiny.edge_2E.T.tolist():
        if left_out not in (source, target):
            links[source].append(target)
            links[target].append(source)
    values = {"x": csr_matrix(tiny.features_ND[:train]), "tx": csr_matrix(tiny.features_ND[test])}
    values |= {"allx": csr_matrix(tiny.features_ND[:known]), "y": one_hot[:train], "ty": one_hot[test]}
    values |= {"ally": one_hot[:known], "graph": links}
    root.mkdir(parents=True)
    for end, value in values.items():
        (root / f"ind.{name}.{end}").write_bytes(pickle.dumps(value, protocol=4))
    (root / f"ind.{name}.test.index").write_text("".join(f"{node}\n" for node in test))
    return tiny


def write_wordnet(root: Path) -> Path:
    """Four synsets in the format of wndb(5WN): a dog is an animal, to bark is derived from it, and loud is alike."""
    root.mkdir(parents=True)
    lines = {
        "noun": ["  1 the licence",
                 "00000100 05 n 02 dog 0 hound 0 002 @ 00000200 n 0000 + 00000300 v 0101 | a loud animal",
                 "00000200 03 n 01 animal 0 001 ~ 00000100 n 0000 | a living being"],
        "verb": ["00000300 32 v 01 bark 0 001 + 00000100 n 0101 01 + 02 00 | make a loud noise"],
        "adj": ["00000400 00 s 01 loud 0 001 & 00000500 a 0000 | of sound", "00000500 00 a 01 noisy 0 000 | of sound"],
        "adv": ["00000600 02 r 01 loudly 0 001 \\ 00000400 a 0101 | in a loud way"],
    }  # fmt: skip
    for part, text in lines.items():
        (root / f"data.{part}").write_text("\n".join(text) + "\n")
    return root
