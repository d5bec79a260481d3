"""Merging: the experts of each group become one, their weighted mean, and slots lead to it.

Read one expert at a time: whatever the model's size, a group's parameter is in memory twice at most. Experts are those
of a checkpoint, by global id, so that the ranks over which they were split do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.checkpoint.format import BUFFER
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.recipes.merge_compress.align import Expert, alignment, reordered
from dist_moe.recipes.merge_compress.group import Leaders, Numbers

Match = Callable[[Expert, Expert], Tensor]
"""Gives (H,): which unit of the second expert takes the place of each unit of the first."""

_COLUMNS_AT_ONCE = 1 << 16
"""Weights of each expert that are compared in fp64 at a time."""


@dataclass(frozen=True)
class MergedLayer:
    """The groups of a layer's experts, and how each becomes one.

    ``leader_E``: groups, by their leaders; the new experts are the groups by rising leader. ``share_E``: the share that
    each expert has in its group's mean. ``order_EH``: its units in the order of its group's mean, None: as they are.
    ``hidden_axes``: see ExpertBank.
    """

    leader_E: Leaders
    share_E: Numbers
    order_EH: Tensor | None
    hidden_axes: Mapping[str, int]

    @property
    def leaders(self) -> Leaders:
        """The leader of each new expert."""
        return np.unique(self.leader_E)

    @property
    def expert_E(self) -> Tensor:
        """Return (E,) int64: the new expert that each expert is part of."""
        return torch.from_numpy(np.searchsorted(self.leaders, self.leader_E))

    def groups(self) -> list[list[int]]:
        """Return the members of each new expert."""
        return [np.flatnonzero(self.leader_E == leader).tolist() for leader in self.leaders]


def shares(leader_E: Leaders, weight_E: Numbers) -> Numbers:
    """Return the share of each expert in its group's mean, proportional to ``weight_E``; equal ones if all are 0."""
    share_E = np.empty(len(leader_E))
    for leader in np.unique(leader_E):
        members = leader_E == leader
        total, count = weight_E[members].sum(), members.sum()
        share_E[members] = weight_E[members] / total if total > 0 else 1 / count
    return share_E


def orders(
    weights: ModelWeights,
    layer: str,
    reference_E: Leaders,
    hidden_axes: Mapping[str, int],
    match: Match | None = None,
) -> Tensor | None:
    """Return (E, H): each expert's units as they match those of its reference; None if experts have no such units.

    ``reference_E``: the id of an expert for each. An expert that is its own reference stays as it is. ``match``: gives
    the order of an expert's units, given its reference and it; None: :func:`alignment`, by their weights.
    """
    if not hidden_axes:
        return None
    order_EH: list[Tensor] = []
    for expert, reference in enumerate(reference_E.tolist()):
        ours = one_expert(weights, layer, expert)
        name = next(name for name in ours if name in hidden_axes)
        order_H = torch.arange(ours[name].shape[hidden_axes[name] - 1])
        if expert != reference:
            theirs = one_expert(weights, layer, reference)
            order_H = match(theirs, ours) if match else alignment(theirs, ours, hidden_axes)
        order_EH.append(order_H)
    return torch.stack(order_EH)


def weight_similarity(
    weights: ModelWeights, layer: str, order_EH: Tensor | None, hidden_axes: Mapping[str, int]
) -> Numbers:
    """Return (E, E) cosines of all weights of the experts, their units in the order that is given.

    Of the whole layer, one parameter is in memory at a time, in its own precision.
    """
    product_EE = torch.zeros((), dtype=torch.float64)
    for name in filter(lambda name: name.startswith(bank_of(layer)), weights):
        parameter = name.removeprefix(bank_of(layer))
        rows = [
            piece if order_EH is None else reordered(piece, parameter, order_EH[expert], hidden_axes)
            for expert, piece in enumerate(piece.cpu() for piece in weights.pieces(name))
        ]
        row_EW = torch.stack([row.flatten() for row in rows])
        for part_EW in row_EW.split(_COLUMNS_AT_ONCE, dim=1):
            wide_EW = part_EW.double()
            product_EE = product_EE + wide_EW @ wide_EW.T
    return cosines(product_EE)


def cosines(product_EE: Tensor) -> Numbers:
    """Return cosines from scalar products; 0 where a vector is 0."""
    norm_E = product_EE.diagonal().sqrt()
    cosine_EE = product_EE / torch.outer(norm_E, norm_E).clamp_min(torch.finfo(torch.float64).tiny)
    result: Numbers = cosine_EE.numpy()
    return result


def one_expert(weights: ModelWeights, layer: str, expert: int) -> dict[str, Tensor]:
    """Return the parameters of one expert."""
    ACTIVITY.beat()
    bank = bank_of(layer)
    return {name.removeprefix(bank): weights.read(name, expert).cpu() for name in weights if name.startswith(bank)}


def bank_of(layer: str) -> str:
    """Return how the names of a layer's expert parameters begin."""
    return f"{layer}.experts."


def merged_weights(
    weights: ModelWeights, layers: Mapping[str, MergedLayer], buffers: Mapping[str, Tensor]
) -> ModelWeights:
    """Return ``weights`` with the experts of each layer merged, which is done as they are read.

    ``layers``: by the layers' names. What is neither an expert's nor a slot map's stays, to the bit. ``buffers``: the
    slot maps, and what else has changed.
    """
    layer_of = {name: layer for layer in layers for name in weights if name.startswith(bank_of(layer))}

    def read(name: str, expert: int | None) -> Tensor:
        ACTIVITY.beat()
        if name in buffers:
            return buffers[name]
        if expert is None or name not in layer_of:
            return weights.read(name, expert)
        layer, parameter = layers[layer_of[name]], name.removeprefix(bank_of(layer_of[name]))
        mean = torch.zeros(weights.specs[name].shape[1:], dtype=torch.float64)
        for member in filter(layer.share_E.__getitem__, layer.groups()[expert]):
            weight = weights.read(name, member).double().cpu()
            if layer.order_EH is not None:
                weight = reordered(weight, parameter, layer.order_EH[member], layer.hidden_axes)
            mean += float(layer.share_E[member]) * weight
        return mean.to(weights.specs[name].dtype)

    of_maps = tuple(f"{layer}.slot_map." for layer in layers)  # with a permutation's that has been learnt
    kinds = {name: kind for name, kind in weights.kinds.items() if not name.startswith(of_maps)}
    specs = {name: weights.specs[name] for name in kinds}
    for name, layer in layer_of.items():
        specs[name] = TensorSpec(specs[name].dtype, (len(layers[layer].leaders), *specs[name].shape[1:]))
    kinds |= dict.fromkeys(buffers, BUFFER)
    return replace(weights, kinds=kinds, specs=specs | {n: TensorSpec.of(b) for n, b in buffers.items()}, read=read)
