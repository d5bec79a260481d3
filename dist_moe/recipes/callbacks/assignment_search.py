"""Assignment search on a task's training examples, at chosen steps of the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from dist_moe.config.settings import LARGEST_STEP
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.gates import GateSettings
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.entropy_window import EntropyWindow
from dist_moe.recipes.callbacks.table_search import SearchSchedule, batches_of, ready_to_search, seed_at, task_loss
from dist_moe.search import AssignmentSearch, AssignmentSearchConfig, SearchReport, StreamedScores
from dist_moe.search.scores import streamed_bytes
from dist_moe.tasks.task import Task

Step = Annotated[int, Field(ge=1, le=LARGEST_STEP)]
Share = Annotated[float, Field(ge=0, le=1)]


class AssignmentScheduleConfig(AssignmentSearchConfig, SearchSchedule):
    """Assignment search while training, early: at the first steps, or while the gates' trees harden."""

    part: ClassVar[str] = "assignment_search"

    every_steps: Step = Field(10, description="training steps between two searches")
    until_step: Step | None = Field(
        120, description="no search after this training step (null: until the end); counts without while_entropy alone"
    )
    at_steps: tuple[Step, ...] = Field(
        (), description="the training steps that searches follow (empty: as every_steps and the others say)"
    )
    while_entropy: tuple[Share, Share] | None = Field(
        None,
        description="search every every_steps while the entropy of what the gates choose, as a share of the largest "
        "possible one, lies between these two, the higher first; never again once it was below the lower. Measured at "
        "every train.log_every-th step, for gates that harden: comet and dselect_k with an entropy_weight (null: until "
        "until_step)",
    )

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.while_entropy is not None and self.while_entropy[0] <= self.while_entropy[1]:
            raise ValueError(
                f"while_entropy={list(self.while_entropy)}: entropy falls, so that the first share must be the "
                "higher one, such as [0.99, 0.5]"
            )
        if self.while_entropy is not None and self.at_steps:
            raise ValueError(
                f"while_entropy={list(self.while_entropy)}: at_steps={list(self.at_steps)} says when to "
                "search already; give one of them"
            )
        return self

    def check(self, train: TrainConfig, steps_per_epoch: int) -> None:
        """Raise UserError if training, or ``until_step``, ends before a search is due or entropy is measured."""
        first, steps = min(self.at_steps, default=self.every_steps), train.total_steps(steps_per_epoch)
        field = f"at_steps={list(self.at_steps)}" if self.at_steps else f"every_steps={self.every_steps}"
        if first > steps:
            raise UserError(
                f"assignment_search.{field}: the first search would follow step {first}, but training ends after "
                f"{steps}; give at most {steps}"
            )
        if self.while_entropy is not None:
            self._check_measured(train.log_every, steps)
        elif not self.at_steps and self.until_step is not None and self.until_step < first:
            raise UserError(
                f"assignment_search.until_step={self.until_step}: no search is due by then; give at least "
                f"every_steps={first}, or null"
            )

    def _check_measured(self, log_every: int, steps: int) -> None:
        # A step's numbers are collected after the search that follows it.
        first = self.every_steps * (log_every // self.every_steps + 1)
        if first > steps:
            raise UserError(
                f"assignment_search.while_entropy={list(self.while_entropy or ())}: entropy is first measured after "
                f"step train.log_every={log_every}, and the first search would follow step {first}, but training ends "
                f"after {steps}; give a smaller train.log_every or assignment_search.every_steps, or null"
            )

    def check_gate(self, gate: GateSettings) -> None:
        """Raise UserError for ``while_entropy`` with a gate that records no entropy."""
        if self.while_entropy is not None and not gate.has_entropy:
            weight = getattr(gate, "entropy_weight", None)
            raise UserError(
                f"assignment_search.while_entropy={list(self.while_entropy)}: model.gate.name={gate.name} "
                f"{'' if weight is None else f'with entropy_weight={weight:g} '}records no entropy of what it chooses; "
                "use comet or dselect_k with model.gate.entropy_weight above 0, or at_steps or until_step instead"
            )

    def window(self) -> EntropyWindow | None:
        """Return a new window of ``while_entropy``."""
        return None if self.while_entropy is None else EntropyWindow(*self.while_entropy)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a search follows training step ``step`` (counted from 1), if the window is open then."""
        if self.at_steps:
            return step in self.at_steps
        ends = None if self.while_entropy is not None else self.until_step
        return step % self.every_steps == 0 and (ends is None or step <= ends)

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
            return AssignmentSearch(fitted, verified, self).run(seed_at(seed, step))
