"""Swap search on a problem's validation examples: while training, or on a finished run."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.engine.activity import ACTIVITY
from dist_moe.engine.launch_environment import LaunchEnvironment
from dist_moe.models import MoEModel
from dist_moe.recipes.problem import Problem
from dist_moe.search import SwapReport, SwapSearch, SwapSearchConfig


class SwapScheduleConfig(SwapSearchConfig):
    """Swap search while training."""

    every_epochs: float = Field(1.0, gt=0, description="epochs between two searches")
    until_epoch: float | None = Field(None, gt=0, description="no search after this epoch (null: until the end)")

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a search follows training step ``step`` (counted from 1)."""
        every = max(1, round(self.every_epochs * steps_per_epoch))
        last = np.inf if self.until_epoch is None else self.until_epoch * steps_per_epoch
        return step % every == 0 and step <= last


def search_swaps(
    problem: Problem,
    model: MoEModel,
    config: SwapSearchConfig,
    weights: tuple[float, float],
    environment: LaunchEnvironment,
) -> SwapReport:
    """Swap experts between slots while that lowers the task loss on the first validation examples.

    Collective over all ranks; every rank scores its share of the examples.
    """
    examples = np.arange(min(config.examples, len(problem.val)))
    batches = [
        problem.val.batch(index_B, examples).to(environment.device)
        for index_B in shard_batches(
            examples, config.batch_size, rank=environment.rank, world_size=environment.world_size
        )
    ]

    def loss(batch: Any) -> Tensor:
        ACTIVITY.beat()
        return problem.weighted(problem.task_losses(model(*batch.inputs), batch), weights)

    model.table.begin_evaluation()
    return SwapSearch(model, batches, loss, config).run()
