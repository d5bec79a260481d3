"""DeepSpeed's own ``MoE``: every expert's rows padded to a capacity.

"capacity": a capacity factor that just drops nothing, which its user cannot know. "dropless": it pads to the
fullest expert of all ranks by itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.parallel import World
from tools.bench.candidate import Candidate, Gradients, Layer, grad_of, local_experts
from tools.bench.peers.feed_forward import SwiGLU, gradients_of, load
from tools.bench.workloads import Material, Workload


class DeepSpeedMoE(Layer):
    """``deepspeed.moe.layer.MoE`` without its random choices."""

    def __init__(self, workload: Workload, given: Material, world: World, *, dropless: bool) -> None:
        super().__init__()
        import_deepspeed()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            workload.width,
            SwiGLU(workload.width, workload.hidden, workload.torch_dtype),
            workload.experts,
            ep_size=world.size,
            k=workload.k,
            capacity_factor=1 + fullest(workload, given),
            min_capacity=0,
            drop_tokens=not dropless,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.moe.set_deepspeed_parallelism()
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        load(self.experts, given, local_experts(workload, world))
        self.router = self.moe.deepspeed_moe.gate.wg.weight
        self.router.data = given.router_ED.clone()

    def forward(self, x_TD: Tensor) -> Tensor:
        output_TD: Tensor = self.moe(x_TD)[0]
        return output_TD

    def gradients(self) -> Gradients:
        return {"router": grad_of(self.router)} | gradients_of(self.experts)


def fullest(workload: Workload, given: Material) -> float:
    """How far the fullest expert of these tokens is above the mean, relative to it."""
    load_E = torch.bincount(given.expert_TK.flatten(), minlength=workload.experts)
    mean = max(given.expert_TK.numel(), 1) / workload.experts
    return max(float(load_E.max()) / mean - 1, 0.0)


def _unfit_capacity(workload: Workload) -> str | None:
    if workload.ranks > 1 and (workload.max_violation or workload.empty_rank):
        return "its capacity must be the same on all ranks, whose fullest experts differ"
    return None


PACKAGES = (("deepspeed", "deepspeed>=0.19.8"),)
CANDIDATES = (
    Candidate(
        "DeepSpeed MoE, capacity", partial(DeepSpeedMoE, dropless=False), unfit=_unfit_capacity, packages=PACKAGES
    ),
    Candidate("DeepSpeed MoE, dropless", partial(DeepSpeedMoE, dropless=True), packages=PACKAGES),
)
