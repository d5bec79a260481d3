"""Two fits in one process: a tree gate over four experts learns y = sin(x), then goes on with another learning rate.

Run: python examples/fit_twice.py
"""

import torch

import dist_moe
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss


class Points:
    """128 points a step, drawn by step number, as a feed gives them."""

    steps_per_epoch = 50

    def micro_batches(self, step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.rand(128, 2, generator=generator) * 6 - 3]


def objective(model: torch.nn.Module, x: torch.Tensor) -> StepLoss:
    loss = (model(x).outputs[0][:, 0] - x[:, 0].sin()).square().mean()
    return StepLoss(loss)


torch.manual_seed(0)
experts = dist_moe.experts.FeedForwardBank(2, 32, 4, range(4), out_dim=1)
moe = dist_moe.MoE([dist_moe.gates.Comet(dim=2, num_experts=4, k=2)], experts)
for lr in (1e-2, 1e-3):
    deepspeed = {"optimizer": {"type": "AdamW", "params": {"lr": lr}}, "zero_optimization": {"stage": 1}}
    dist_moe.fit(moe, Points(), objective, TrainConfig(epochs=2, batch_size=128), deepspeed=deepspeed)
    print(f"lr {lr}: loss {objective(moe, Points().micro_batches(999)[0]).loss.item():.5f}")
