"""Ragged against padded, as tokens need fewer and fewer of the k experts that they may have.

A token has between 1 and k experts. The ragged layer dispatches and computes these only; the padded one k rows per
token, the superfluous ones with weight zero. Both get the assignments from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_moe.gates import Gate
from dist_moe.gates.base import Mixture
from dist_moe.layer import MoE
from dist_moe.parallel import World
from dist_moe.routing import Route
from tools.bench import memory
from tools.bench.candidate import Gradients, Layer, grad_of, step
from tools.bench.jobs import Job
from tools.bench.layer import Place, in_turns
from tools.bench.ours import bank, gradients_of_bank, padded_mixture
from tools.bench.workloads import Material, Workload, material

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Mean number of experts of a token over the largest."""
LARGEST_DIFFERENCE = 1e-4
REPETITIONS = 9


class GivenGate(Gate):
    """Assignments from outside; the weights are parameters."""

    def __init__(self, dim: int, num_experts: int, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> None:
        super().__init__(dim, num_experts)
        self.token_N, self.expert_N, self.weight_N = token_N, expert_N, nn.Parameter(weight_N)

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        return Route(self.token_N, self.expert_N, self.weight_N, len(x_TD), self.num_experts)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        return Mixture(self.route(x_TD, ids_T).dense().unsqueeze(1))


class RaggedLayer(Layer):
    """Computes the assignments that ``wanted_TK`` marks."""

    def __init__(self, workload: Workload, given: Material, world: World, wanted_TK: Tensor) -> None:
        super().__init__()
        token_N, place_N = wanted_TK.nonzero(as_tuple=True)
        expert_N = given.expert_TK[token_N, place_N]
        order_N = (token_N * workload.experts + expert_N).argsort()
        weight_N = weights(wanted_TK)[token_N, place_N]
        assigned = (t[order_N] for t in (token_N, expert_N, weight_N))
        gate = GivenGate(workload.width, workload.experts, *assigned)
        self.order_N, self.wanted_TK = order_N, wanted_TK
        self.moe = MoE(gate, bank(workload, given, world), world=world)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(x_TD).outputs[0].to(x_TD.dtype)

    def gradients(self) -> Gradients:
        grad_N = torch.empty_like(self.moe.gates[0].weight_N)
        grad_N[self.order_N] = grad_of(self.moe.gates[0].weight_N)
        table_TK = torch.zeros(self.wanted_TK.shape)
        table_TK[self.wanted_TK] = grad_N
        return {"router": table_TK} | gradients_of_bank(self.moe.experts)


class PaddedLayer(Layer):
    """Computes k rows per token."""

    def __init__(self, workload: Workload, given: Material, world: World, wanted_TK: Tensor) -> None:
        super().__init__()
        self.expert_TK, self.wanted_TK, self.world = given.expert_TK, wanted_TK, world
        self.weight_TK = nn.Parameter(weights(wanted_TK))
        self.experts = bank(workload, given, world)

    def forward(self, x_TD: Tensor) -> Tensor:
        return padded_mixture(x_TD, self.expert_TK, self.weight_TK, self.experts, self.world)

    def gradients(self) -> Gradients:
        return {"router": grad_of(self.weight_TK) * self.wanted_TK} | gradients_of_bank(self.experts)


def weights(wanted_TK: Tensor) -> Tensor:
    """(T, K) falling with the place, 0 where nothing is wanted, of sum 1 per token."""
    falling_K = 1.0 / torch.arange(1, wanted_TK.shape[1] + 1)
    weight_TK = falling_K * wanted_TK
    return weight_TK / weight_TK.sum(dim=1, keepdim=True)


def wanted(tokens: int, k: int, share: float, seed: int) -> Tensor:
    """(T, K) bool: each token's first places, at least one, ``share`` of all places in total."""
    generator = torch.Generator().manual_seed(seed)
    count_T = torch.ones(tokens, dtype=torch.int64)
    left_over = round(share * tokens * k) - tokens
    spare_N = torch.arange(tokens).repeat(k - 1)[torch.randperm(tokens * (k - 1), generator=generator)]
    count_T += torch.bincount(spare_N[:left_over], minlength=tokens)
    return torch.arange(k) < count_T.unsqueeze(1)


def study(job: Job, place: Place) -> dict[str, Any]:
    """By share: seconds, wire bytes and peak memory of both, at the same assignments. Collective."""
    workload, world = job.workload, place.world
    given = material(workload, world.rank, job.seed)
    shares = [share for share in SHARES if share * workload.k >= 1]
    tables = {share: wanted(len(given.x_TD), workload.k, share, job.seed) for share in shares}
    kinds: dict[str, type[RaggedLayer | PaddedLayer]] = {"ragged": RaggedLayer, "padded": PaddedLayer}
    found: dict[str, dict[str, Any]] = {}
    layers: dict[str, Layer] = {}
    for share, wanted_TK in tables.items():
        results = []
        for kind, made in kinds.items():
            place.say(f"{kind} {share}")
            key = f"{kind} {share}"
            layers[key] = layer = made(workload, given, world, wanted_TK)
            world.traffic.reset()
            results.append(_tensors(layer, given))
            sent = world.traffic.bytes
            found[key] = {
                "kind": kind,
                "share": share,
                "assignments": int(wanted_TK.sum()),
                "wire_bytes": sent,
                "memory": asdict(memory.of_layer(layer, given)),
            }
        _check_equal(*results)
    place.say("timing")
    calls: dict[str, Callable[[], object]] = {
        key: lambda layer=layer: step(layer, given.x_TD, given.cotangent_TD) for key, layer in layers.items()
    }
    for key, seconds in in_turns(calls, REPETITIONS, say=place.say).items():
        found[key]["seconds"] = seconds
    fixed = memory.needed(workload)
    return {
        "workload": asdict(workload),
        "fixed_bytes": fixed["gradients of weights"] + fixed["inputs and outputs"] // 2,
        "measured": list(found.values()),
    }


def slope(share: list[float], quantity: list[float]) -> float:
    """Return the slope of ``quantity``, relative to that at the largest share: 1 where it is proportional."""
    relative = np.divide(quantity, quantity[int(np.argmax(share))])
    return float(np.polyfit(share, relative, 1)[0])


def _tensors(layer: Layer, given: Material) -> dict[str, Tensor]:
    output_TD, grad_TD = step(layer, given.x_TD, given.cotangent_TD)
    return {"output": output_TD, "x": grad_TD} | layer.gradients()


def _check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        scale = tensor.abs().max().clamp(min=torch.finfo(tensor.dtype).tiny)
        difference = float((tensor - other[name]).abs().max() / scale)
        if not difference < LARGEST_DIFFERENCE:
            raise ValueError(f"ragged and padded differ in {name} by {difference}")
