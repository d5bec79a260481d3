"""What ZeRO stage 3 holds: slices of every parameter, and those parameters that it brings together.

DeepSpeed slices parameter by parameter, each padded to its number of ranks. It keeps small parameters whole
(``stage3_param_persistence_threshold``), and others from one use to the next if that is near
(``stage3_max_reuse_distance``, 1e9 numbers if it is not set: from the second step on a model of that size is whole
on every rank while a step lasts).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dist_moe.search import SlotTable

Share = Callable[[nn.Parameter], int]
"""Over how many ranks a parameter is sliced."""

_DEFAULTS = {
    "stage3_param_persistence_threshold": 1e5,
    "stage3_model_persistence_threshold": sys.maxsize,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}
_AT_ONCE = 2
"""Modules of which a backward pass may need the parameters at the same time: two inputs of one operation."""


def slice_elements(parameters: Sequence[nn.Parameter], share: int) -> int:
    """Numbers of ``parameters`` on each rank."""
    return sum(_slice(parameter, share) for parameter in parameters)


def gathered_elements(model: nn.Module, share: Share, zero: dict[str, Any]) -> tuple[int, int]:
    """Numbers that are whole on a rank beside its slices: always, and at most during a step.

    ``zero``: the section ``zero_optimization``. A parameter that is not shared is its own slice.
    """
    size = {name: int(zero.get(name, default)) for name, default in _DEFAULTS.items()}
    whole = {id(p): _slice(p, share(p)) * share(p) for p in model.parameters() if share(p) > 1}
    kept = {id(p) for p in _kept(model, size)} & whole.keys()
    of_modules = sorted(
        sum(whole.get(id(p), 0) for p in module.parameters(recurse=False) if id(p) not in kept)
        for module in model.modules()
    )
    near = size["stage3_max_reuse_distance"] + size["stage3_prefetch_bucket_size"]
    always = sum(whole[key] for key in kept)
    return always, min(sum(whole.values()), always + sum(of_modules[-_AT_ONCE:]) + near)


def _kept(model: nn.Module, size: dict[str, int]) -> list[nn.Parameter]:
    """Those that DeepSpeed keeps whole, in the order of its choice, and the tables, which searches read."""
    kept: list[nn.Parameter] = [p for m in model.modules() if isinstance(m, SlotTable) for p in m.parameters()]
    total = 0
    for parameter in model.parameters():
        fits = parameter.numel() + total <= size["stage3_model_persistence_threshold"]
        if fits and parameter.numel() <= size["stage3_param_persistence_threshold"]:
            kept.append(parameter)
            total += parameter.numel()
    return kept


def _slice(parameter: nn.Parameter, share: int) -> int:
    return -(-parameter.numel() // share)
