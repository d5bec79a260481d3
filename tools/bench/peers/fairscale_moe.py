"""FairScale's ``MOELayer``: top-2 only, fp32 only, a dense (T, E, C) table, a fixed capacity of twice the mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_moe.parallel import World
from tools.bench.candidate import Candidate, Gradients, Layer, grad_of, local_experts
from tools.bench.peers.feed_forward import SwiGLU, gradients_of, load
from tools.bench.workloads import Material, Workload


class FairScaleMoE(Layer):
    """``MOELayer(Top2Gate, experts)`` without the noise of its second choice."""

    def __init__(self, workload: Workload, given: Material, world: World) -> None:
        super().__init__()
        from fairscale.nn.moe import MOELayer, Top2Gate, top2gate

        top2gate.gumbel_rsample = _no_noise
        here = local_experts(workload, world)
        self.local = here.stop - here.start
        experts = nn.ModuleList(SwiGLU(workload.width, workload.hidden, torch.float32) for _ in range(self.local))
        load(experts, given, here)
        gate = Top2Gate(workload.width, workload.experts)
        gate.wg.weight = nn.Parameter(given.router_ED.clone())
        self.moe = MOELayer(gate, experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        """It wants its first axis divisible by the local experts."""
        output: Tensor = self.moe(x_TD.view(self.local, -1, x_TD.shape[1]))
        return output.view_as(x_TD)

    def gradients(self) -> Gradients:
        return {"router": grad_of(self.moe.gate.wg.weight)} | gradients_of(self.moe.experts)


def _no_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device)


def _unfit(workload: Workload) -> str | None:
    if workload.k != 2:
        return "top-2 only"
    if workload.dtype != "float32":
        return "fp32 only"
    if workload.max_violation:
        return "its capacity is the mean load: it drops tokens under skew"
    if workload.tokens % workload.experts:
        return "its tokens must be divisible by the experts"
    return None


def _table_bytes(workload: Workload) -> int:
    """(T, E, C) tables, C = 2 T / E: some six of them at once, forward and backward."""
    return 6 * 2 * workload.tokens**2 * 4


CANDIDATES = (
    Candidate(
        "FairScale MOELayer",
        FairScaleMoE,
        unfit=_unfit,
        packages=(("fairscale", "fairscale>=0.4.13"),),
        extra_bytes=_table_bytes,
    ),
)
