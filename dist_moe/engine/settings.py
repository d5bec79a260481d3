"""The section ``train``: how long, how much at once, and how often to write."""

from __future__ import annotations

from pydantic import Field

from dist_moe.config.settings import LARGEST_EPOCHS, LARGEST_STEP, Settings
from dist_moe.errors import UserError


class TrainConfig(Settings):
    """How long, how much at once, and how often to write."""

    epochs: float = Field(1.0, gt=0, le=LARGEST_EPOCHS, description="passes over the training examples")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=LARGEST_STEP,
        description="stop after this many steps, whatever epochs says (null: epochs decides)",
    )
    batch_size: int = Field(
        512, ge=1, description="global batch: examples per step over all ranks and accumulation steps"
    )
    log_every: int = Field(
        10, ge=1, description="steps between two collections of the ranks' metrics; every step is recorded"
    )
    time_every: int = Field(
        10,
        ge=0,
        description="steps between two whose gate, dispatch, experts and combine are timed (0: none is)",
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    async_checkpoints: bool = Field(
        True,
        description="write checkpoints beside the training, from a copy in host memory (false: the training waits)",
    )
    checkpoint_failures_allowed: int = Field(
        2,
        ge=0,
        description="checkpoints in a row that may fail to be written (disk full, read-only) before the run ends; "
        "a run whose last checkpoint fails always ends with that message",
    )
    validate_every: int | None = Field(
        None, ge=1, description="steps between two validations (null: at the end of each epoch)"
    )

    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many validations without a better loss, and test the best weights "
        "(null: train to the end and test the last weights); a resumed run counts the validations before it too",
    )

    max_skipped_steps: int = Field(
        10,
        ge=1,
        description="training ends with an error after this many steps in a row whose loss or gradient is not finite; "
        "each of them is skipped on all ranks and recorded as skipped=1",
    )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run. Raises UserError if there are too many."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        steps = min(steps, self.max_steps) if self.max_steps else steps
        if steps > LARGEST_STEP:
            raise UserError(
                f"train.epochs={self.epochs:g} are {steps:,} steps of a batch of {self.batch_size}; a run has at most "
                f"{LARGEST_STEP:,}: give train.max_steps, or fewer epochs"
            )
        return steps
