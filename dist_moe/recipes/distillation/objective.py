"""The loss of a step with a teacher: the tasks' losses, the auxiliary ones, and what the teacher adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.deepspeed.gradient_alignment import GradientAlignment
from dist_moe.engine.monitor.step_window import Sums
from dist_moe.engine.training import StepLoss, Trainer
from dist_moe.recipes.distillation.teacher import Teacher
from dist_moe.tasks.objective import WeightedObjective

Terms = Callable[[Any, Any, Any], dict[str, Tensor]]
"""(student's output, teacher's output, batch) -> weighted losses by name: each a sum over the batch divided by a
count of the whole step, as in :mod:`dist_moe.recipes.distillation.moebert`. Their names are recorded."""


class DistillationObjective(Callback):
    """``objective`` with the losses that ``terms`` makes of the student's output and the ``teacher``'s.

    Takes the place of a :class:`~dist_moe.tasks.objective.WeightedObjective`. ``align``: what of the terms'
    gradient contradicts that of all other losses is taken out; the cosine of the two is recorded as ``teacher_cosine``.
    ``weight``: of the losses of ``objective``, which are recorded without it.
    ``ask``: keyword arguments for both models beside the batch's inputs, such as ``{"hidden_states": True}``.
    """

    def __init__(
        self,
        objective: WeightedObjective,
        teacher: Teacher,
        terms: Terms,
        ask: Mapping[str, Any] | None = None,
        *,
        align: bool = False,
        weight: float = 1.0,
    ) -> None:
        self._objective = objective
        self._teacher = teacher
        self._terms = terms
        self._align = align
        self._weight = weight
        self._alignment: GradientAlignment | None = None
        self._ask = dict(ask or {})

    def on_start(self, trainer: Trainer) -> None:
        """Align gradients in this engine, where that is wanted."""
        if self._align:
            self._alignment = GradientAlignment(trainer.engine)

    def __call__(self, model: nn.Module, batch: Any) -> StepLoss:
        taught = self._teacher(*batch.inputs, **self._ask)  # before the student's pass, whose activations are kept
        output = model(*batch.inputs, **self._ask)
        plain = self._objective.of_output(output, batch)
        terms = self._terms(output, taught, batch)
        added = torch.stack(list(terms.values())).sum()
        total = plain.sums["total_loss"]
        assert isinstance(total, Tensor)
        sums: Sums = plain.sums | terms | {"total_loss": self._weight * total + added}
        leading, following = self._weight * plain.loss, added * self._objective.shares
        if self._alignment is None:
            return StepLoss(leading + following, sums)
        loss = self._alignment(leading, following)
        return StepLoss(loss, sums | {"teacher_cosine": self._cosine()})

    def _cosine(self) -> Tensor:
        """Return this rank's part of the cosine, in the micro-batch that ends the step: recorded numbers add up."""
        assert self._alignment is not None
        ended = self._alignment.is_last
        return self._alignment.cosine / self._alignment.num_ranks if ended else torch.zeros_like(self._alignment.cosine)
