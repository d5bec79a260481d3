"""The user's own graphs: a saved PyG ``Data``, an npz file, a directory of CSV files, of GraphSAINT's or of OGB's.

| what ``data.root`` is | what it holds |
| --- | --- |
| ``NAME.pt`` | ``torch.save(Data(x, edge_index, y[, train_mask, val_mask, test_mask]))`` |
| ``NAME.npz`` | ``features`` (N, D), ``edges`` (2, E), ``labels`` (N,); masks (N,) or none: ``train_mask`` ... |
| a directory with ``edges.csv`` | that (source,target), ``features.csv``, ``labels.csv``, ``masks.csv`` or none |
| a directory with ``adj_full.npz`` | GraphSAINT's layout (Flickr, Reddit, Yelp): feats.npy, class_map.json, role.json |
| one with ``raw`` and ``split`` | OGB's (ogbn-arxiv, ogbn-products): raw/edge.csv.gz, raw/node-feat.csv.gz ... |

No pickle is run: tensors are loaded by ``weights_only``, arrays without objects. A label of -1 is none.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_moe.config.files import absolute, digest_of, read_json_object
from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.files import readable
from dist_moe.data.fetch.restricted_pickle import UnpicklingError
from dist_moe.data.graphs.graph import UNLABELLED, Parts, RawGraph
from dist_moe.data.prepared import PARTS
from dist_moe.errors import UserError

LAYOUTS = "a saved PyG Data (.pt), an npz file, or a directory of CSV files, of GraphSAINT's or of OGB's layout"
MASKS = tuple(f"{part}_mask" for part in PARTS)


def find_files(root: Path) -> tuple[Callable[[Path], RawGraph], dict[str, str]]:
    """Return what reads the graph in ``root``, and the SHA-256 of the files that it reads, by name.

    Raises UserError for what is no graph in any of the layouts.
    """
    root = absolute(root)
    with readable(root):
        if root.is_file() and root.suffix in (".pt", ".pth", ".npz"):
            return (_read_npz if root.suffix == ".npz" else _read_pyg), {root.name: digest_of(root)}
        for marker, (read, names) in _DIRECTORIES.items():
            if (root / marker).exists():
                found = [path for name in names for path in sorted(root.glob(name)) if path.is_file()]
                return read, {str(path.relative_to(root)): digest_of(path) for path in found}
    raise UserError(f"data.root={root} holds no graph that is known. Remedy: give {LAYOUTS} (docs/graphs.md)")


def _read_pyg(path: Path) -> RawGraph:
    try:
        from torch_geometric.data import data as pyg
        from torch_geometric.data.storage import GlobalStorage
    except ImportError as error:
        raise UserError(
            f"data.root={path} is a saved PyG Data, which torch_geometric reads: install the extra, "
            "pip install 'comet-dist-moe[graphs]'"
        ) from error
    try:
        with torch.serialization.safe_globals([pyg.Data, pyg.DataEdgeAttr, pyg.DataTensorAttr, GlobalStorage]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no saved PyG Data of tensors: {reason}. Remedy: torch.save(data, PATH)") from error
    content = loaded.to_dict() if isinstance(loaded, pyg.Data) else loaded
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a PyG Data. Remedy: torch.save(data, PATH)")
    return _from_fields(path, content, {"features": "x", "edges": "edge_index", "labels": "y"})


def _read_npz(path: Path) -> RawGraph:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}. Remedy: numpy.savez(PATH, features=, ...)") from error
    return _from_fields(path, content, {name: name for name in ("features", "edges", "labels")})


def _from_fields(path: Path, content: Mapping[str, Any], names: Mapping[str, str]) -> RawGraph:
    arrays = {}
    for field, name in [*names.items(), *((mask, mask) for mask in MASKS if content.get(mask) is not None)]:
        if content.get(name) is None:
            raise UserError(f"{path} has no {name}; it has {', '.join(sorted(content))}. Remedy: add it")
        arrays[field] = np.asarray(content[name])
    label_N = arrays["labels"]
    label_N = label_N[:, 0] if label_N.ndim == 2 and label_N.shape[1] == 1 else label_N
    given = {part: arrays[mask] for part, mask in zip(PARTS, MASKS, strict=True) if mask in arrays}
    return checked(path, arrays["features"], arrays["edges"], label_N, _of_masks(path, given))


def _of_masks(path: Path, masks: Mapping[str, NDArray[Any]]) -> Parts | None:
    if not masks:
        return None
    for part in PARTS:
        if part not in masks or masks[part].dtype != bool or masks[part].ndim != 1:
            kind = f"{masks[part].dtype} {list(masks[part].shape)}" if part in masks else "not there"
            raise UserError(f"{path}: {part}_mask is {kind}. Remedy: give a bool (N,) for each of {', '.join(MASKS)}")
    return {part: np.flatnonzero(mask) for part, mask in masks.items()}


def checked(
    path: Path, features_ND: NDArray[Any], edge_2E: NDArray[Any], label_N: NDArray[Any], parts: Parts | None
) -> RawGraph:
    """Return the graph of these arrays. Raises UserError that names file, array and value for what does not fit."""

    def refuse(what: str, remedy: str) -> UserError:
        return UserError(f"{path}: {what}. Remedy: {remedy}")

    if features_ND.ndim != 2 or features_ND.dtype.kind not in "fiub" or not np.isfinite(features_ND).all():
        what = f"{features_ND.dtype} {list(features_ND.shape)}, or not finite"
        raise refuse(f"the features are {what}", "give finite numbers, a row for each node")
    count = len(features_ND)
    if edge_2E.ndim != 2 or edge_2E.shape[0] != 2 or edge_2E.dtype.kind not in "iu":
        raise refuse(f"the edges are {edge_2E.dtype} {list(edge_2E.shape)}", "give whole numbers (2, E)")
    if edge_2E.size and (edge_2E.min() < 0 or edge_2E.max() >= count):
        wrong = edge_2E.max() if edge_2E.max() >= count else edge_2E.min()
        raise refuse(f"an edge has node {wrong}, and there are {count} nodes", f"number nodes from 0 to {count - 1}")
    if label_N.shape != (count,) or label_N.dtype.kind not in "iuf":
        raise refuse(f"the labels are {label_N.dtype} {list(label_N.shape)}", f"give a class for each of {count} nodes")
    label_N = np.where(np.isnan(label_N), UNLABELLED, label_N) if label_N.dtype.kind == "f" else label_N
    if (label_N < UNLABELLED).any() or (label_N != label_N.astype(np.int64)).any():
        raise refuse("a label is no class", "give whole numbers from 0; -1 for no label")
    for part, node_N in (parts or {}).items():
        if len(node_N) and (node_N.min() < 0 or node_N.max() >= count):
            raise refuse(f"the nodes of {part} are beyond the {count} of the graph", "give masks of N entries")
    several = np.concatenate([*parts.values()]) if parts else np.empty(0)
    if len(np.unique(several)) < len(several):
        raise refuse("a node is in two of train, val and test", "give parts that have none in common")
    return RawGraph(features_ND, edge_2E.astype(np.int64), label_N.astype(np.int64), parts)


def _csv(path: Path) -> NDArray[Any]:
    """Return the numbers of a CSV file without a header, gzipped or not, a row a line. Raises UserError."""
    rows = [line.split(",") for line in File(path, path.read_bytes()).lines() if line]
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"{path} has lines of {len(rows[0])} cells and others. Remedy: as many in every line")
    for kind in (np.int64, np.float64):
        try:
            return np.array(rows, dtype=kind)
        except ValueError as error:
            reason = str(error)
    raise UserError(f"{path} has a cell that is no number: {reason}. Remedy: numbers only, no header")


def _read_csv(root: Path) -> RawGraph:
    with readable(root):
        masks = root / "masks.csv"
        words = np.array(File(masks, masks.read_bytes()).lines()) if masks.exists() else None
        if words is not None and (unknown := set(words.tolist()) - {*PARTS, ""}):
            raise UserError(f"{masks} has {sorted(unknown)[0]!r}. Remedy: train, val, test or nothing on every line")
        parts = None if words is None else {part: np.flatnonzero(words == part) for part in PARTS}
        arrays = [_csv(root / f"{name}.csv") for name in ("features", "edges", "labels")]
        return checked(root, arrays[0], arrays[1].T, arrays[2][:, 0], parts)


def _read_graphsaint(root: Path) -> RawGraph:
    """Read adj_full.npz (a scipy matrix), feats.npy, class_map.json (class by node) and role.json (tr, va, te)."""
    from scipy.sparse import csr_matrix

    with readable(root):
        try:
            with np.load(root / "adj_full.npz", allow_pickle=False) as adj:
                matrix = csr_matrix((adj["data"], adj["indices"], adj["indptr"]), shape=adj["shape"])
            features_ND = np.load(root / "feats.npy", allow_pickle=False)
            classes, roles = (read_json_object(root / f"{name}.json") for name in ("class_map", "role"))
            label_N = np.array([classes[str(node)] for node in range(len(features_ND))])
            parts = {part: np.sort(np.array(roles[x])) for part, x in zip(PARTS, ("tr", "va", "te"), strict=True)}
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{root} is not as GraphSAINT has it: {error!r}. Remedy: copy it again") from error
    if label_N.ndim != 1:
        raise UserError(f"{root}/class_map.json has several classes for a node. Remedy: give a graph of one class each")
    return checked(root, features_ND, np.stack(matrix.nonzero()).astype(np.int64), label_N, parts)


def _read_ogb(root: Path) -> RawGraph:
    """Read raw/edge, raw/node-feat, raw/node-label and split/NAME/{train,valid,test}, all .csv.gz."""
    with readable(root):
        features_ND, edges, labels = (_csv(root / "raw" / f"{n}.csv.gz") for n in ("node-feat", "edge", "node-label"))
        splits = sorted((root / "split").iterdir())
        if len(splits) != 1:
            raise UserError(f"{root}/split has {len(splits)} directories. Remedy: leave the one that is meant")
        parts = {part: _csv(splits[0] / f"{n}.csv.gz")[:, 0] for part, n in zip(PARTS, _OGB_PARTS, strict=True)}
        return checked(root, features_ND, edges.T, labels[:, 0], parts)


_OGB_PARTS = ("train", "valid", "test")
_DIRECTORIES: dict[str, tuple[Callable[[Path], RawGraph], tuple[str, ...]]] = {
    "edges.csv": (_read_csv, ("*.csv",)),
    "adj_full.npz": (_read_graphsaint, ("adj_full.npz", "feats.npy", "class_map.json", "role.json")),
    "raw/edge.csv.gz": (_read_ogb, ("raw/*.csv.gz", "split/*/*.csv.gz")),
}
"""Readers of directories by the file that tells the layout, and the files of it."""
