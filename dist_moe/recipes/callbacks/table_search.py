"""Searches over a task's slot -> expert tables while training: when, on which examples, in which precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_moe.data.batches import Examples, shard_batches
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.deepspeed.sharded_parameters import is_sharded
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Trainer
from dist_moe.gates import GateSettings
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.entropy_window import EntropyWindow
from dist_moe.recording import recording
from dist_moe.search import BatchLoss, SearchReport
from dist_moe.search.layers import is_held
from dist_moe.search.swap import TableSearchConfig
from dist_moe.tasks.objective import weighted_sum
from dist_moe.tasks.task import Task


class SearchSchedule(TableSearchConfig, ABC):
    """A search and the training steps that it follows. ``part``: the section's name, in a run's configuration and among
    its metrics."""

    part: ClassVar[str]

    @abstractmethod
    def check(self, train: TrainConfig, steps_per_epoch: int) -> None:
        """Raise UserError if training ends before a search is due."""

    def check_gate(self, gate: GateSettings) -> None:
        """Raise UserError for a gate that has not what the schedule goes by."""

    def window(self) -> EntropyWindow | None:
        """Return a new window within which alone a search that is due takes place; None: there is no such limit."""
        return None

    @abstractmethod
    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a search follows training step ``step`` (counted from 1)."""

    @abstractmethod
    def bytes_needed(self, layers: Sequence[MoE], tokens_per_example: float, ranks: int) -> int:
        """Return what a search takes on each of ``ranks`` ranks beside the model, but for passes over a batch."""

    @abstractmethod
    def search(
        self,
        task: Task,
        model: MoEModel,
        weights: tuple[float, ...],
        environment: LaunchEnvironment,
        seed: int,
        step: int,
    ) -> SearchReport:
        """Search the tables of ``model`` after training step ``step`` of the run of ``seed``. Collective."""


def seed_at(seed: int, step: int) -> int:
    """Return a seed for one step of a run: runs of other seeds do not meet it at other steps, as with a sum."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


class TableSearchCallback(Callback):
    """Searches at the steps of a schedule, within its window, if it has one.

    Not while a permutation is learnt or all tables are held.
    """

    def __init__(self, schedule: SearchSchedule, task: Task, weights: tuple[float, ...], seed: int) -> None:
        self._schedule, self._task, self._weights, self._seed = schedule, task, weights, seed
        self._window = schedule.window()

    @property
    def name(self) -> str:
        """The section's name."""
        return self._schedule.part

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Search if that is due, and show what was found."""
        if trainer.model.learning or not self._schedule.due(step, trainer.steps_per_epoch):
            return
        if self._window is not None and not self._window.is_open:
            return
        if {is_held(table) for table in trainer.tables.values()} == {True}:
            return
        title = self._schedule.part.replace("_", " ")
        ACTIVITY.enter(title)
        environment = trainer.groups.environment
        found = self._schedule.search(self._task, trainer.model, self._weights, environment, self._seed, step)
        before, after, swaps = found.losses[0], found.losses[-1], len(found.swaps)
        metrics = {"loss_before": before, "loss_after": after, "swaps": swaps, "verified": found.verified}
        trainer.monitor.metrics(self._schedule.part, metrics, step)
        control = f"; the control {self._schedule.control} is taken instead" if self._schedule.control else ""
        trainer.monitor.say(
            f"{title} after step {step}: loss {before:.4g} -> {after:.4g} by {swaps} swap(s), "
            f"{found.screened} screened, {found.verified} verified{control}"
        )

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Measure how far the gates have hardened, and say when that ends the searches."""
        if self._window is None:
            return
        was_over = self._window.is_over
        self._window.measure(trainer.layers, trainer.settings.log_every, records)
        if self._window.is_over and not was_over:
            title = self._schedule.part.replace("_", " ")
            trainer.monitor.say(
                f"no {title} after step {records[-1]['step']}: the gates' entropy is {self._window.share:.3g} of the "
                "largest possible one, below the window"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what the window has measured."""
        return {} if self._window is None else self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what the window had measured."""
        if self._window is not None:
            self._window.load_state_dict(state)


def batches_of(
    examples: Examples[Any], rows: NDArray[Any], batch_size: int, environment: LaunchEnvironment
) -> list[Any]:
    """Return this rank's share of the given rows, on its device, in batches; as many on every rank."""
    parts = shard_batches(rows, batch_size, rank=environment.rank, world_size=environment.world_size)
    return [examples.batch(rows[index_B], rows).to(environment.device) for index_B in parts]


def task_loss(task: Task, model: MoEModel, weights: tuple[float, ...]) -> BatchLoss:
    """Return the weighted loss of a batch without auxiliary losses, in the precision of the model's parameters."""

    def loss(batch: Any) -> Tensor:
        ACTIVITY.beat()
        precision = next(model.parameters()).dtype
        inputs = (x.to(precision) if x.is_floating_point() else x for x in batch.inputs)
        return weighted_sum(task.task_losses(model(*inputs), batch), weights)

    return loss


@contextmanager
def ready_to_search(model: MoEModel) -> Iterator[None]:
    """Within, the model is in fp64 and its tables are those that it is evaluated by; nothing is recorded.

    How the examples are shared out then makes no difference between tables, not even between nearly equal ones. (At
    ZeRO stage 3, where no rank holds the parameters, in their own precision.)
    """
    model.begin_evaluation()
    with in_double_precision(model), recording(None):
        yield


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
