"""DeepSpeed's AutoEP layer: dropless, unequal splits, torch's grouped product or a loop over the experts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.parallel import World
from tools.bench.candidate import Candidate, Gradients, Layer, grad_of
from tools.bench.workloads import Material, Workload


class AutoEP(Layer):
    """``AutoEPMoELayer`` in place of a block whose weights are laid out as transformers does."""

    def __init__(self, workload: Workload, given: Material, world: World, *, grouped: bool) -> None:
        super().__init__()
        import_deepspeed()
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        spec = MoELayerSpec(
            moe_module_name="mlp",
            model_family="qwen3_moe",
            router_name="gate",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_up_proj",
            expert_w2_name="down_proj",
            expert_w3_name=None,
            num_experts=workload.experts,
            top_k=workload.k,
            hidden_size=workload.width,
            ffn_hidden_size=workload.hidden,
            score_func="softmax",
            score_apply="post",
            route_norm=workload.k > 1,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=False,
            shared_experts_name="",
        )
        config = AutoEPConfig(enabled=True, autoep_size=world.size, use_grouped_mm=grouped)
        self.moe = AutoEPMoELayer(spec, Source(given), world.size, world.rank, config)
        self.moe.set_deepspeed_parallelism()

    def forward(self, x_TD: Tensor) -> Tensor:
        output_1TD: Tensor = self.moe(x_TD.unsqueeze(0))
        return output_1TD.squeeze(0)

    def gradients(self) -> Gradients:
        experts = self.moe.experts
        of_experts = (("gate", experts.w1), ("up", experts.w3), ("down", experts.w2))
        router = {"router": grad_of(self.moe.router.gate.weight)}
        return router | {name: grad_of(p).transpose(1, 2) for name, p in of_experts}


class Source(nn.Module):
    """A block of transformers, as far as AutoEP reads it."""

    def __init__(self, given: Material) -> None:
        super().__init__()
        experts, width = given.router_ED.shape
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate.weight = nn.Parameter(given.router_ED.clone())
        self.experts = nn.Module()
        gate_up_E2FD = torch.cat([given.gate_EDF, given.up_EDF], dim=2).transpose(1, 2).contiguous()
        self.experts.gate_up_proj = nn.Parameter(gate_up_E2FD)
        self.experts.down_proj = nn.Parameter(given.down_EFD.transpose(1, 2).contiguous())


PACKAGES = (("deepspeed", "deepspeed>=0.19.8"),)
CANDIDATES = (
    Candidate("DeepSpeed AutoEP, grouped_mm", partial(AutoEP, grouped=True), packages=PACKAGES),
    Candidate("DeepSpeed AutoEP, loop", partial(AutoEP, grouped=False), packages=PACKAGES),
)
