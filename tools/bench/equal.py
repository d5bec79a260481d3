"""Outputs and gradients of every candidate must equal those of a plain loop over the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.bench.candidate import Layer, step
from tools.bench.workloads import Material, Workload, material

LARGEST_ERROR = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 6e-2), "float64": (1e-12, 1e-11)}
"""Allowed per tensor: norm of the difference over the norm, and largest difference over the largest entry."""


@dataclass(frozen=True)
class Expected:
    """Results of this rank: ``output`` and ``x``'s gradient; gradients of the router by this rank's tokens, and of this
    rank's experts by all ranks' tokens."""

    tensors: dict[str, Tensor]


def expected(workload: Workload, given: Material, rank: int = 0, seed: int = 0) -> Expected:
    """Computed in fp32 (fp64 for fp64) expert by expert, from nothing but the material of all ranks."""
    count = workload.experts // workload.ranks
    ours = range(rank * count, (rank + 1) * count)
    tensors = _loop(workload, given, range(workload.experts))
    here = {name: tensors[name][ours.start : ours.stop] for name in ("gate", "up", "down")}
    for other in range(workload.ranks):
        if other != rank:
            theirs = _loop(workload, material(workload, other, seed), ours)
            here = {name: of_here + theirs[name][ours.start : ours.stop] for name, of_here in here.items()}
    return Expected(tensors | here)


def _loop(workload: Workload, given: Material, experts: range) -> dict[str, Tensor]:
    dtype = torch.float64 if workload.torch_dtype == torch.float64 else torch.float32
    x_TD, router_ED = (t.detach().to(dtype).requires_grad_() for t in (given.x_TD, given.router_ED))
    weight_TK = (x_TD @ router_ED.T).softmax(dim=-1).gather(1, given.expert_TK)
    if workload.k > 1:
        weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    leaf_TK, leaf_TD = (t.detach().requires_grad_() for t in (weight_TK, x_TD))
    output_TD = torch.zeros_like(x_TD)
    grads = {name: torch.zeros(given_E.shape, dtype=dtype) for name, given_E in _weights(given).items()}
    for e in experts:
        token_N, place_N = (given.expert_TK == e).nonzero(as_tuple=True)
        gate, up, down = (weight_E[e].detach().to(dtype).requires_grad_() for weight_E in _weights(given).values())
        rows = leaf_TD[token_N]
        result_ND = (F.silu(rows @ gate) * (rows @ up)) @ down * leaf_TK[token_N, place_N].unsqueeze(1)
        result_ND.backward(given.cotangent_TD[token_N].to(dtype))
        output_TD = output_TD.detach().index_add(0, token_N, result_ND.detach())
        for name, leaf in (("gate", gate), ("up", up), ("down", down)):
            grads[name][e] = leaf.grad
    by_weight = torch.zeros_like(leaf_TK) if leaf_TK.grad is None else leaf_TK.grad
    by_row = torch.zeros_like(leaf_TD) if leaf_TD.grad is None else leaf_TD.grad
    weight_TK.backward(by_weight)
    assert x_TD.grad is not None
    assert router_ED.grad is not None
    return {"output": output_TD, "x": x_TD.grad + by_row, "router": router_ED.grad} | grads


def _weights(given: Material) -> dict[str, Tensor]:
    return {"gate": given.gate_EDF, "up": given.up_EDF, "down": given.down_EFD}


def differences(layer: Layer, given: Material, wanted: Expected) -> dict[str, tuple[float, float]]:
    """By tensor: norm of the difference over the norm, largest difference over the largest entry."""
    output_TD, grad_TD = step(layer, given.x_TD, given.cotangent_TD)
    found = {"output": output_TD, "x": grad_TD} | layer.gradients()
    layer.zero_grad(set_to_none=True)
    return {name: _difference(found[name], wanted.tensors[name]) for name in wanted.tensors}


def _difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    if not wanted.numel():
        return 0.0, 0.0
    by = found.to(wanted.dtype) - wanted
    if not torch.isfinite(by).all():
        return float("inf"), float("inf")
    smallest = torch.finfo(wanted.dtype).tiny
    return float(by.norm() / wanted.norm().clamp(min=smallest)), float(
        by.abs().max() / wanted.abs().max().clamp(min=smallest)
    )


def unequal(workload: Workload, found: dict[str, tuple[float, float]]) -> str | None:
    """Return the difference in words; None if everything is equal."""
    norm, largest = LARGEST_ERROR[workload.dtype]
    wrong = [f"{name} by {of_norm:.1e}" for name, (of_norm, most) in found.items() if of_norm > norm or most > largest]
    return f"unequal: {', '.join(wrong)}" if wrong else None
