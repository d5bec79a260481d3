"""The MoE block of transformers (Qwen3; Mixtral's is the same but for k = 1) with its three ways on a CPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dist_moe.parallel import World
from tools.bench.candidate import Candidate, Gradients, Layer, grad_of
from tools.bench.workloads import Material, Workload


class TransformersMoE(Layer):
    """``Qwen3MoeSparseMoeBlock`` with ``_experts_implementation``."""

    def __init__(self, workload: Workload, given: Material, world: World, *, implementation: str) -> None:
        super().__init__()
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=workload.width,
            moe_intermediate_size=workload.hidden,
            num_experts=workload.experts,
            num_experts_per_tok=workload.k,
            norm_topk_prob=workload.k > 1,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.block = Qwen3MoeSparseMoeBlock(config)
        gate_up_E2FD = torch.cat([given.gate_EDF, given.up_EDF], dim=2).transpose(1, 2).contiguous()
        self.block.gate.weight = nn.Parameter(given.router_ED.clone())
        self.block.experts.gate_up_proj = nn.Parameter(gate_up_E2FD)
        self.block.experts.down_proj = nn.Parameter(given.down_EFD.transpose(1, 2).contiguous())

    def forward(self, x_TD: Tensor) -> Tensor:
        output_1TD: Tensor = self.block(x_TD.unsqueeze(0))
        return output_1TD.squeeze(0)

    def gradients(self) -> Gradients:
        gate_ED2F = grad_of(self.block.experts.gate_up_proj).transpose(1, 2)
        gate_EDF, up_EDF = gate_ED2F.chunk(2, dim=2)
        down_EFD = grad_of(self.block.experts.down_proj).transpose(1, 2)
        return {"router": grad_of(self.block.gate.weight), "gate": gate_EDF, "up": up_EDF, "down": down_EFD}


def _unfit(workload: Workload) -> str | None:
    return "one rank only" if workload.ranks > 1 else None


def _weights_of_every_row(workload: Workload) -> int:
    """batched_mm copies an expert's weights for each of its rows, and makes gradients of these."""
    of_one_expert = workload.weight_bytes // workload.experts
    return 2 * workload.tokens * workload.k * of_one_expert


CANDIDATES = tuple(
    Candidate(
        f"transformers, {implementation}",
        partial(TransformersMoE, implementation=implementation),
        unfit=_unfit,
        packages=(("transformers", "transformers>=5.23"),),
        extra_bytes=_weights_of_every_row if implementation == "batched_mm" else lambda workload: 0,
    )
    for implementation in ("eager", "batched_mm", "grouped_mm")
)
