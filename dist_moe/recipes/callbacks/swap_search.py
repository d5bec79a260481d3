"""Swap search on a task's validation examples: while training, or on a finished run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_EPOCHS
from dist_moe.data.batches import shard_batches, spread_over
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.deepspeed.sharded_parameters import is_sharded
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Trainer
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recording import recording
from dist_moe.search import SwapReport, SwapSearch, SwapSearchConfig
from dist_moe.search.layers import is_held
from dist_moe.tasks.objective import weighted_sum
from dist_moe.tasks.task import Task


class SwapScheduleConfig(SwapSearchConfig):
    """Swap search while training."""

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


class SwapSearchCallback(Callback):
    """Searches by swaps at the steps of a schedule, but not while a permutation is learnt or all tables are held."""

    def __init__(self, task: Task, config: SwapScheduleConfig, weights: tuple[float, ...]) -> None:
        self._task, self._config, self._weights = task, config, weights

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Search if that is due, and show what was found."""
        if trainer.model.learning or not self._config.due(step, trainer.steps_per_epoch):
            return
        if {is_held(table) for table in trainer.tables.values()} == {True}:
            return
        ACTIVITY.enter("swap search")
        environment = trainer.groups.environment
        found = search_swaps(self._task, trainer.model, self._config, self._weights, environment)
        before, after, swaps = found.losses[0], found.losses[-1], len(found.swaps)
        metrics = {"loss_before": before, "loss_after": after, "swaps": swaps, "verified": found.verified}
        trainer.monitor.metrics("swap_search", metrics, step)
        trainer.monitor.say(
            f"swap search after step {step}: loss {before:.4g} -> {after:.4g} by {swaps} swap(s), "
            f"{found.screened} screened, {found.verified} verified"
        )


def search_swaps(
    task: Task,
    model: MoEModel,
    config: SwapSearchConfig,
    weights: tuple[float, ...],
    environment: LaunchEnvironment,
) -> SwapReport:
    """Swap experts between slots while that lowers the task loss on validation examples, spread over all of them.

    Collective over all ranks; every rank scores its share of the examples, in fp64: how the examples are
    shared out then makes no difference between tables, not even between nearly equal ones. (At ZeRO stage 3,
    where no rank holds the parameters, in their own precision.)
    """
    examples = spread_over(len(task.val), config.examples)
    batch_size = min(config.batch_size, task.eval_batch)
    batches = [
        task.val.batch(examples[index_B], examples).to(environment.device)
        for index_B in shard_batches(examples, batch_size, rank=environment.rank, world_size=environment.world_size)
    ]

    def loss(batch: Any) -> Tensor:
        ACTIVITY.beat()
        precision = next(model.parameters()).dtype
        inputs = (x.to(precision) if x.is_floating_point() else x for x in batch.inputs)
        return weighted_sum(task.task_losses(model(*inputs), batch), weights)

    model.begin_evaluation()
    with in_double_precision(model), recording(None):
        return SwapSearch(model, batches, loss, config).run()


@contextmanager
def in_double_precision(model: nn.Module) -> Iterator[None]:
    """Within, the model's floating-point parameters and buffers are fp64 copies; after, what they were before.

    A model with sharded parameters stays as it is.
    """
    sharded = any(map(is_sharded, model.parameters()))
    tensors = [x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point() and not sharded]
    originals = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.double()
        yield
    finally:
        for x, original in zip(tensors, originals, strict=True):
            x.data = original
