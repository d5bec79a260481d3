"""When to stop for want of progress: the validation losses so far, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping


class EarlyStopping:
    """Counts validations without a better loss. ``history``: the losses of a resumed run, by step.

    With ``patience`` None nothing is ever given up and no best is kept.
    """

    def __init__(self, patience: int | None, history: Mapping[int, float] | None = None) -> None:
        self.patience = patience
        self.losses: dict[int, float] = {}
        self._best_step = 0
        for step, loss in sorted((history or {}).items()):
            self.add(step, loss)

    def add(self, step: int, loss: float) -> bool:
        """Take the validation loss after ``step`` steps; whether it is the best so far (a NaN never is)."""
        best = self.losses.get(self._best_step, math.inf)
        self.losses[step] = loss
        if self.patience is None or not loss < best:
            return False
        self._best_step = step
        return True

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` validations in a row brought nothing better."""
        since_best = sum(step > self._best_step for step in self.losses)
        return self.patience is not None and since_best >= self.patience
