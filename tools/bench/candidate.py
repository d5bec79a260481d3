"""The thing that is timed: a layer of somebody's, built from the given weights."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_moe.parallel import World
from tools.bench.workloads import Material, Workload

Gradients = dict[str, Tensor]
"""``router`` (E, D); of this rank's experts ``gate``, ``up`` (E_local, D, F) and ``down`` (E_local, F, D)."""


class Layer(nn.Module, ABC):
    """An MoE layer of some system. Forward: (T, D) -> (T, D)."""

    @abstractmethod
    def gradients(self) -> Gradients:
        """Return the gradients of the last backward pass, in the common layout; zeros where the system leaves none."""


@dataclass(frozen=True)
class Candidate:
    """``build``: the layer of a workload with given weights on this rank. ``unfit``: why it cannot do a workload,
    or None. ``packages``: what must be installed, name on the index by import name. ``extra_bytes``: memory that
    it needs above its weights and the rows, where that is a matter."""

    name: str
    build: Callable[[Workload, Material, World], Layer]
    unfit: Callable[[Workload], str | None] = lambda workload: None
    packages: tuple[tuple[str, str], ...] = ()
    extra_bytes: Callable[[Workload], int] = lambda workload: 0

    def missing(self) -> str | None:
        """How to install what it needs; None if everything is there."""
        absent = [package for module, package in self.packages if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else None


def local_experts(workload: Workload, world: World) -> slice:
    """The experts of this rank: contiguous, the same number on each rank."""
    count = workload.experts // world.size
    return slice(world.rank * count, (world.rank + 1) * count)


def step(layer: Layer, x_TD: Tensor, cotangent_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; the output and the gradient of the tokens. Gradients are allocated anew."""
    layer.zero_grad(set_to_none=True)
    leaf_TD = x_TD.detach().requires_grad_()
    output_TD = layer(leaf_TD)
    output_TD.backward(cotangent_TD)
    assert leaf_TD.grad is not None
    return output_TD.detach(), leaf_TD.grad


def grad_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
