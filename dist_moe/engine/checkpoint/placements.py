"""Placements in checkpoints: saved under their layers' names, restored where they fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dist_moe.engine.checkpoint.format import SavedPlacements
from dist_moe.layer import MoE
from dist_moe.parallel import Placement


def placements_of(model: nn.Module) -> SavedPlacements:
    """Return the placements of a model's layers, as JSON can hold them."""
    return {
        name: {
            "num_ranks": layer.placement.num_ranks,
            "expert_of_position": list(layer.placement.expert_of_position),
        }
        for name, layer in _layers(model)
        if not layer.placement.is_identity
    }


def restore_placements(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Place the experts of every layer as saved, where that is for as many ranks and experts; else in order.

    For a model whose weights are loaded afterwards. On every rank.
    """
    for name, layer in _layers(model):
        placement = Placement.identity(layer.experts.num_experts, layer.world.size)
        if name in saved:
            found = Placement(tuple(saved[name]["expert_of_position"]), saved[name]["num_ranks"])
            if (found.num_experts, found.num_ranks) == (placement.num_experts, placement.num_ranks):
                placement = found
        layer.place(placement)


def _layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module
