"""Assignment search on a task's training examples, at chosen steps of the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from dist_moe.config.settings import LARGEST_STEP
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.table_search import SearchSchedule, batches_of, ready_to_search, task_loss
from dist_moe.search import AssignmentSearch, AssignmentSearchConfig, SearchReport, StreamedScores
from dist_moe.search.scores import streamed_bytes
from dist_moe.tasks.task import Task

Step = Annotated[int, Field(ge=1, le=LARGEST_STEP)]


class AssignmentScheduleConfig(AssignmentSearchConfig, SearchSchedule):
    """Assignment search while training. A gate whose trees harden has its window early, in the first hundred steps."""

    part: ClassVar[str] = "assignment_search"

    every_steps: Step = Field(10, description="training steps between two searches")
    until_step: Step | None = Field(120, description="no search after this training step (null: until the end)")
    at_steps: tuple[Step, ...] = Field(
        (), description="the training steps that searches follow (empty: as every_steps and until_step say)"
    )

    def check(self, train: TrainConfig, steps_per_epoch: int) -> None:
        """Raise UserError if training, or ``until_step``, ends before a search is due."""
        first, steps = min(self.at_steps, default=self.every_steps), train.total_steps(steps_per_epoch)
        field = f"at_steps={list(self.at_steps)}" if self.at_steps else f"every_steps={self.every_steps}"
        if first > steps:
            raise UserError(
                f"assignment_search.{field}: the first search would follow step {first}, but training ends after "
                f"{steps}; give at most {steps}"
            )
        if not self.at_steps and self.until_step is not None and self.until_step < first:
            raise UserError(
                f"assignment_search.until_step={self.until_step}: no search is due by then; give at least "
                f"every_steps={first}, or null"
            )

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a search follows training step ``step`` (counted from 1)."""
        if self.at_steps:
            return step in self.at_steps
        return step % self.every_steps == 0 and (self.until_step is None or step <= self.until_step)

    def bytes_needed(self, layers: Sequence[MoE], tokens_per_example: float, ranks: int) -> int:
        """Return the bytes of a batch of a rank and of a chunk of all experts' results."""
        of_rank = -(-max(self.examples, self.verified_on) // ranks)
        return streamed_bytes(layers, min(self.batch_size, of_rank) * tokens_per_example, self.chunk_bytes)

    def search(
        self,
        task: Task,
        model: MoEModel,
        weights: tuple[float, ...],
        environment: LaunchEnvironment,
        seed: int,
        step: int,
    ) -> SearchReport:
        """Search the tables of ``model`` on training examples that are drawn anew for every step. Collective.

        Those that give dL/dP and those that verify are different ones; of fewer than asked for, the shares are kept.
        """
        wanted = self.examples + self.verified_on
        count = min(wanted, len(task.train))
        row_N = np.random.default_rng((seed, step)).choice(len(task.train), count, replace=False).astype(np.int64)
        cut = max(1, count * self.examples // wanted)
        loss, size = task_loss(task, model, weights), min(self.batch_size, task.eval_batch)
        fitted, verified = (
            StreamedScores(model, batches_of(task.train, rows, size, environment), loss, self.chunk_bytes)
            for rows in (row_N[:cut], row_N[cut:])
        )
        with ready_to_search(model):
            return AssignmentSearch(fitted, verified, self).run(seed + step)
