"""A model whose gradients are known beforehand: one number per expert, one dense number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.experts import ExpertBank
from dist_moe.parallel import experts_of_rank


class Numbers(ExpertBank):
    """``weight`` (E_local, 1): expert e starts at 100 + e."""

    def __init__(self, num_experts: int, expert_ids: range) -> None:
        super().__init__(1, 1, num_experts, expert_ids)
        self.weight = nn.Parameter(100.0 + torch.tensor(expert_ids, dtype=torch.float32).unsqueeze(1))

    def forward(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        return self.weight.repeat_interleave(torch.tensor(rows_per_expert), dim=0)


class Toy(nn.Module):
    def __init__(self, num_experts: int, groups: ProcessGroups) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.tensor([10.0]))
        self.experts = Numbers(num_experts, experts_of_rank(num_experts, groups.world))

    def forward(self, slope: float, slope_E: list[float]) -> Tensor:
        """Its gradient on this rank: ``slope`` for the dense number, ``slope_E[e]`` for expert e."""
        mine_E = torch.tensor([slope_E[e] for e in self.experts.expert_ids]).unsqueeze(1)
        return (slope * self.dense).sum() + (self.experts.weight * mine_E).sum()


@contextmanager
def toy_engine(groups: ProcessGroups, num_experts: int, **section: Any) -> Iterator[ExpertParallelEngine]:
    """Destroyed at the end: DeepSpeed's hooks would keep it, and with it the threads of its groups."""
    world_size = groups.environment.world_size
    completed = complete_deepspeed_section(section, world_size, world_size)
    engine = ExpertParallelEngine(Toy(num_experts, groups), completed, groups)
    try:
        yield engine
    finally:
        engine.destroy()
