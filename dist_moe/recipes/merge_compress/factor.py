"""Experts of a checkpoint as U V + S: the decomposition of whole ones, and S without the rows that were pruned.

    W = A diag(sigma) B^T,   U = A_r sqrt(sigma_r),   V = sqrt(sigma_r) B_r^T,   S = W - U V

(Li et al.: LoSparse, ICML 2023.) S is taken from the factors as they are rounded, so that U V + S is W again, whatever
the rank; what U V alone misses is the least that any matrix of that rank does (Eckart and Young, 1936). Experts are
read one by one: in memory are one expert's matrix, and the factors of that matrix of all experts of its layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.checkpoint.format import BUFFER, EXPERTS
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.recipes.merge_compress.merge import bank_of

Matrices = Mapping[str, Sequence[str]]
"""For each MoE layer, by name, the matrices that its experts may have: ExpertBank.matrices."""


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return V^T (in, rank) and U^T (rank, out) of ``weight`` (in, out) = W^T, in its type; computed in fp64."""
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root_P = sigma[:rank].sqrt()
    return (left[:, :rank] * root_P).to(weight.dtype), (root_P.unsqueeze(1) * right[:rank]).to(weight.dtype)


def factored_weights(weights: ModelWeights, layers: Matrices, rank: int) -> ModelWeights:
    """Return ``weights`` with the experts' matrices as U V + S, which has all its rows; see ExpertBank.factor."""
    whole = {bank_of(layer) + name for layer, names in layers.items() for name in names} & weights.keys()
    parts = {f"{name}_{part}": (name, part) for name in whole for part in ("into", "back", "sparse", "row_ids")}
    known: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def factors_of(name: str, expert: int) -> tuple[Tensor, Tensor]:
        if name not in known:
            known.clear()  # all parts of a matrix are read before the next one's
            known[name] = {}
        if expert not in known[name]:
            known[name][expert] = factors(weights.read(name, expert).cpu(), rank)
        return known[name][expert]

    def read(name: str, expert: int | None) -> Tensor:
        if name not in parts:
            return weights.read(name, expert)
        matrix, part = parts[name]
        if expert is None:
            count, _, outputs = weights.specs[matrix].shape
            return torch.arange(outputs, dtype=torch.int32).repeat(count, 1)
        into, back = factors_of(matrix, expert)
        if part == "sparse":
            weight = weights.read(matrix, expert).cpu()
            return (weight.double() - into.double() @ back.double()).to(weight.dtype)
        return into if part == "into" else back

    kinds, specs = dict[str, str](), dict[str, TensorSpec]()
    for name, spec in weights.specs.items():
        if name not in whole:
            kinds[name], specs[name] = weights.kinds[name], spec
            continue
        count, dim, outputs = spec.shape
        for part, shape in {"into": (dim, rank), "back": (rank, outputs), "sparse": (dim, outputs)}.items():
            kinds[f"{name}_{part}"], specs[f"{name}_{part}"] = EXPERTS, TensorSpec(spec.dtype, (count, *shape))
        kinds[f"{name}_row_ids"], specs[f"{name}_row_ids"] = BUFFER, TensorSpec(torch.int32, (count, outputs))
    return replace(weights, kinds=kinds, specs=specs, read=read)


def kept_rows(weights: ModelWeights, layers: Matrices) -> tuple[dict[str, int], ...]:
    """Return, for each layer, how many rows of S an expert has at most, by the matrix's name: ``low_rank.rows``."""
    return tuple(
        {
            name: max((len(places) for places in _places(weights, bank_of(layer) + name)), default=0)
            for name in names
            if f"{bank_of(layer)}{name}_into" in weights
        }
        for layer, names in layers.items()
    )


def dropped_weights(weights: ModelWeights, layers: Matrices) -> ModelWeights:
    """Return factored ``weights`` with those rows of S alone that were not pruned, of as many as :func:`kept_rows`.

    Experts of a layer that have fewer rows than others are padded.
    """
    rows = {
        bank_of(layer) + name: count
        for layer, of_layer in zip(layers, kept_rows(weights, layers), strict=True)
        for name, count in of_layer.items()
        if f"{bank_of(layer)}{name}_sparse" in weights
    }
    changed = {f"{name}_{part}": name for name in rows for part in ("sparse", "row_ids")}

    def read(name: str, expert: int | None) -> Tensor:
        if name not in changed:
            return weights.read(name, expert)
        places, count = _places(weights, changed[name]), rows[changed[name]]
        before = weights.read(name, expert).cpu()
        if expert is not None:
            after = before.new_zeros(len(before), count)
            after[:, : len(places[expert])] = before[:, places[expert]]
            return after
        after = before.new_full((len(before), count), -1)
        for one, ids_Q, kept in zip(after, before, places, strict=True):
            one[: len(kept)] = ids_Q[kept]
        return after

    names = [name for name in weights if name not in changed or rows[changed[name]]]
    specs = {name: weights.specs[name] for name in names}
    for name in changed.keys() & specs.keys():
        shape = specs[name].shape
        specs[name] = TensorSpec(specs[name].dtype, (*shape[:-1], rows[changed[name]]))
    return replace(weights, kinds={name: weights.kinds[name] for name in names}, specs=specs, read=read)


def num_padding(weights: ModelWeights, layers: Matrices) -> int:
    """Return how many numbers of S are padding or pruned: parameters that take memory and do nothing."""
    total = 0
    for layer, names in layers.items():
        for name in (bank_of(layer) + name for name in names):
            if f"{name}_sparse" in weights:
                dim = weights.specs[f"{name}_sparse"].shape[1]
                total += dim * int((weights.read(f"{name}_row_ids", None) < 0).sum())
    return total


def _places(weights: ModelWeights, matrix: str) -> list[Tensor]:
    """Return the places of each expert's rows of S that are not pruned; of none where there is no S."""
    if f"{matrix}_row_ids" not in weights:
        return []
    return [(ids_Q >= 0).nonzero().flatten() for ids_Q in weights.read(f"{matrix}_row_ids", None).cpu()]
