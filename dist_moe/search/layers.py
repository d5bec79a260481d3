"""The MoE layers of a model and their tables, by name."""

from __future__ import annotations

from torch import nn

from dist_moe.layer import MoE
from dist_moe.search.slot_table import SlotTable


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return the MoE layers of ``model`` by name, in the order in which they were registered."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def slot_tables(model: nn.Module) -> dict[str, SlotTable]:
    """Return the slot -> expert tables of ``model`` by their layers' names."""
    layers = moe_layers(model).items()
    return {name: layer.slot_map for name, layer in layers if isinstance(layer.slot_map, SlotTable)}


def is_held(module: nn.Module) -> bool:
    """Return whether ``module`` is held still while others train (engine's ``hold_still``): no search may change it."""
    return "train" in vars(module)
