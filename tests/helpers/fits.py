"""A small model with experts, its data and its objective, for tests that call ``fit`` themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.training import StepLoss
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import experts_of_rank

DIM, EXPERTS, ROWS = 4, 4, 8


class Rows:
    """This rank's share of ``ROWS`` rows a step, of which ``first`` are past, in so many micro-batches."""

    steps_per_epoch = 10

    def __init__(self, environment: LaunchEnvironment, first: int = 0, accumulation: int = 1) -> None:
        size = ROWS // environment.world_size
        self._mine, self._first = slice(environment.rank * size, (environment.rank + 1) * size), first
        self._accumulation = accumulation

    def micro_batches(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self._first + step)
        return list(torch.randn(ROWS, DIM, generator=generator)[self._mine].chunk(self._accumulation))


class Model(nn.Module):
    """Top-2 of four feed-forward experts, and a dense head; its parameters follow torch's generator."""

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        bank = FeedForwardBank(DIM, 6, EXPERTS, experts_of_rank(EXPERTS, groups.world))
        self.moe = MoE(TopK(DIM, EXPERTS, k=2), bank, world=groups.world)
        self.head = nn.Linear(DIM, 1)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(self.head.weight.dtype)
        y_T: Tensor = self.head(self.moe(x_TD).outputs[0])[:, 0]
        return y_T


def objective(model: nn.Module, x_TD: Tensor) -> StepLoss:
    return StepLoss((model(x_TD).float() - x_TD.prod(dim=1)).square().mean())
