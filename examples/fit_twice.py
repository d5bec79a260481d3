"""Two fits in one process: a tree gate over four experts learns y = sin(x), then goes on at a smaller rate."""

import torch

import dist_moe
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss


class Points:
    steps_per_epoch = 50

    def micro_batches(self, step):
        return [torch.rand(128, 2, generator=torch.Generator().manual_seed(step)) * 6 - 3]


def objective(model, x_TD):
    return StepLoss((model(x_TD).outputs[0][:, 0] - x_TD[:, 0].sin()).square().mean())


torch.manual_seed(0)
experts = dist_moe.experts.FeedForwardBank(2, 32, num_experts=4, expert_ids=range(4), out_dim=1)
moe = dist_moe.MoE(dist_moe.gates.Comet(dim=2, num_experts=4, k=2), experts)
for lr in (1e-2, 1e-3):
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": lr}}, "zero_optimization": {"stage": 1}}
    dist_moe.fit(moe, Points(), objective, TrainConfig(batch_size=128), deepspeed=adam)
    print(f"learning rate {lr}: loss {objective(moe, *Points().micro_batches(999)).loss:.6f}")
