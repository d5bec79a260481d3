"""Products with matrices that are mostly 0, as words of texts or the edges of a graph: CSR tensors, on a CPU.

A linear layer, and PyG's layers that begin with one, take CSR features as they are. On an accelerator, in bf16 and
under autocast everything stays dense, and edges a list.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")

SPARSE = 8
"""Entries for one that is not 0, from which on the detour over their places is the shorter way."""


def csr_pays(x: Tensor) -> bool:
    """Return whether products with ``x`` may be those of CSR tensors: on a CPU, in fp32 or fp64."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype in (torch.float32, torch.float64)


def csr_features(x_ND: Tensor) -> Tensor:
    """Return features that need no gradient in CSR, where that is the shorter way; else as they are."""
    if x_ND.requires_grad or not csr_pays(x_ND) or torch.count_nonzero(x_ND) * SPARSE > x_ND.numel():
        return x_ND
    return x_ND.to_sparse_csr()


def dense_if_filled(h_ND: Tensor, adjacency_NN: Tensor) -> Tensor:
    """Return CSR features dense, if their sums over edges are no longer mostly 0; else, and others, as they are."""
    if h_ND.layout != torch.sparse_csr:
        return h_ND
    filled = h_ND.values().numel() * (1 + adjacency_NN.values().numel() / len(h_ND))
    return h_ND.to_dense() if filled * SPARSE > h_ND.numel() else h_ND


def rows_at(x_ND: Tensor, node_B: Tensor) -> Tensor:
    """Return the (B, D) rows ``node_B`` of features, of CSR ones in CSR."""
    if x_ND.layout != torch.sparse_csr:
        return x_ND[node_B]
    one_B = torch.ones(len(node_B), dtype=x_ND.dtype)
    size = (len(node_B), len(x_ND))
    select_BN = torch.sparse_csr_tensor(torch.arange(len(node_B) + 1), node_B, one_B, size, check_invariants=True)
    return select_BN @ x_ND


def dropout(x_ND: Tensor, share: float, training: bool) -> Tensor:
    """Return ``x_ND`` after dropout (Srivastava et al. 2014): in training 0 or x / (1 - share), else ``x_ND``.

    For CSR features numbers are drawn for the entries alone that are not 0: the same distribution by other draws.
    """
    if x_ND.layout != torch.sparse_csr:
        return F.dropout(x_ND, share, training)
    if not training:
        return x_ND
    value_V = F.dropout(x_ND.values(), share)
    places = x_ND.crow_indices(), x_ND.col_indices()
    return torch.sparse_csr_tensor(*places, value_V, x_ND.shape, check_invariants=False)


def csr_adjacency(edge_2E: Tensor, weight_E: Tensor, num_nodes: int) -> Tensor:
    """Return (N, N) A in CSR: row v of A h is the sum of ``weight_E`` h_u over the edges from u into v."""
    source_E, target_E = edge_2E
    size = (num_nodes, num_nodes)
    place_2E = torch.stack([target_E, source_E])
    return torch.sparse_coo_tensor(place_2E, weight_E, size, check_invariants=True).to_sparse_csr()


class Kept:
    """A value computed from tensors, kept as long as they are the same ones and nobody has changed them in place."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._value: Any = None

    def of(self, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """Return the value for the tensors."""
        versions = [tensor._version for tensor in tensors]
        if versions != self._versions or any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            self._tensors, self._versions, self._value = list(tensors), versions, compute()
        return self._value
