"""The budget of a forest: all of its stages together see as many tokens as one dense run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Steps of the dense twin (``total``), of the ``seed`` and of each branch after it (``branch``), and their batches.

    ``twin_batch``, ``branch_batch``: sequences per step. ``branches``: their number; 0 where the seed is all.
    """

    total: int
    seed: int
    branch: int
    twin_batch: int
    branch_batch: int
    branches: int

    @classmethod
    def of(cls, train: TrainConfig, sequences: int, branches: int, seed_share: float, batch: int | None) -> Budget:
        """Share out the budget that ``train`` gives a dense run over ``sequences``.

        ``seed_share``: of the tokens that the seed gets. ``batch``: sequences per step of a branch; None: an equal
        share of the dense batch, so that a branch takes as many steps as the twin after the seed, and the learning-rate
        schedule ends where the twin's does. Raises UserError where there is no such share.
        """
        size = train.batch_size
        total = train.total_steps(max(sequences // size, 1))
        seed = round(seed_share * total)
        if seed == total:
            return cls(total, total, 0, size, size, 0)
        if batch is None and size % branches:
            raise UserError(
                f"train.batch_size={size} cannot be shared out over {branches} branches; give a multiple of "
                f"{branches}, or recipe.branch_batch_size"
            )
        batch = size // branches if batch is None else batch
        steps = max(1, round((total - seed) * size / (branches * batch)))
        return cls(total, seed, steps, size, batch, branches)

    @property
    def sequences(self) -> dict[str, int]:
        """Sequences that the dense twin sees, and those that all stages of the forest see together."""
        forest = self.seed * self.twin_batch + self.branches * self.branch * self.branch_batch
        return {"twin": self.total * self.twin_batch, "forest": forest}


def settings_until(train: TrainConfig, step: int, batch_size: int) -> TrainConfig:
    """Return the settings of a fit that ends after ``step`` steps of ``batch_size``, however large its data."""
    changes: dict[str, Any] = {"max_steps": step, "epochs": float(step), "batch_size": batch_size}
    return train.model_copy(update=changes)
