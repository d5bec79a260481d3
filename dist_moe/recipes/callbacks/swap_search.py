"""Swap search on a task's validation examples: while training, or on a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from dist_moe.config.settings import LARGEST_EPOCHS
from dist_moe.data.batches import spread_over
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.table_search import SearchSchedule, batches_of, ready_to_search, seed_at, task_loss
from dist_moe.search import RecordedScores, SearchReport, SwapSearch, SwapSearchConfig
from dist_moe.search.scores import recorded_bytes
from dist_moe.tasks.task import Task


class SwapScheduleConfig(SwapSearchConfig, SearchSchedule):
    """Swap search while training."""

    part: ClassVar[str] = "swap_search"

    every_epochs: float = Field(1.0, gt=0, le=LARGEST_EPOCHS, description="epochs between two searches")
    until_epoch: float | None = Field(
        None,
        gt=0,
        le=LARGEST_EPOCHS,
        description="no search after this epoch, but for the first one (null: until the end)",
    )

    def check(self, train: TrainConfig, steps_per_epoch: int) -> None:
        """Raise UserError if training ends before a search is due."""
        first, steps = self.first_step(steps_per_epoch), train.total_steps(steps_per_epoch)
        if first > steps:
            raise UserError(
                f"swap_search.every_epochs={self.every_epochs:g}: the first search would follow step {first} "
                f"(an epoch has {steps_per_epoch}), but training ends after {steps}; give at most "
                f"{steps / steps_per_epoch:.3g}"
            )

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a search follows training step ``step`` (counted from 1)."""
        every = self.first_step(steps_per_epoch)
        last = math.inf if self.until_epoch is None else max(every, round(self.until_epoch * steps_per_epoch))
        return step % every == 0 and step <= last

    def first_step(self, steps_per_epoch: int) -> int:
        """Return the training step (from 1) that the first search follows, if no other search still goes on."""
        return max(1, round(self.every_epochs * steps_per_epoch))

    def bytes_needed(self, layers: Sequence[MoE], tokens_per_example: float, ranks: int) -> int:
        """Return the bytes of the recordings of a rank's examples."""
        return recorded_bytes(layers, -(-self.examples // ranks) * tokens_per_example)

    def search(
        self,
        task: Task,
        model: MoEModel,
        weights: tuple[float, ...],
        environment: LaunchEnvironment,
        seed: int,
        step: int,
    ) -> SearchReport:
        """Search the tables of ``model`` on validation examples. Collective."""
        return search_swaps(task, model, self, weights, environment, seed=seed_at(seed, step))


def search_swaps(
    task: Task,
    model: MoEModel,
    config: SwapSearchConfig,
    weights: tuple[float, ...],
    environment: LaunchEnvironment,
    seed: int = 0,
) -> SearchReport:
    """Swap experts between slots while that lowers the task loss on validation examples, spread over all of them.

    Collective over all ranks; every rank scores its share of the examples. ``seed``: of a control's random swaps.
    """
    examples = spread_over(len(task.val), config.examples)
    batches = batches_of(task.val, examples, min(config.batch_size, task.eval_batch), environment)
    with ready_to_search(model):
        return SwapSearch(RecordedScores(model, batches, task_loss(task, model, weights)), config).run(seed)
