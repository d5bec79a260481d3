"""The loss of a step, with a teacher where the configuration names one: MoEBERT's and COMET-BERT's distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_moe.data.labelled_text import LabelledBatch
from dist_moe.engine.loop import StepLoss
from dist_moe.engine.process_groups import ProcessGroups
from dist_moe.models import BertOutput
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.distillation import DistillationObjective, Teacher, hidden_mse, prediction_mse, symmetric_kl
from dist_moe.recipes.objective import WeightedObjective
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.text_classification import TextClassificationProblem


def build_objective(
    config: RunConfig, problem: Problem, groups: ProcessGroups, shares: int
) -> WeightedObjective | TextDistillation:
    """What ``config`` says is to become smaller. Raises UserError if its teacher is not intact or does not fit."""
    objective = WeightedObjective(problem, config.task_weights, shares)
    if config.distillation is None:
        return objective
    assert isinstance(problem, TextClassificationProblem), "RunConfig.check lets no other problem have a teacher"
    teacher = problem.trained(config.distillation.teacher, groups.world).to(groups.device)
    return TextDistillation(objective, Teacher(teacher), config.distillation.weight, problem.is_regression)


class TextDistillation:
    """``objective`` and ``weight`` times what a student's hidden states and predictions differ from its teacher's.

    Sums over the batch divided by counts of the whole step: hidden states by its tokens, predictions by its examples.
    They are recorded as ``teacher_hidden`` and ``teacher_prediction``, weighted.
    """

    def __init__(self, objective: WeightedObjective, teacher: Teacher, weight: float, regression: bool) -> None:
        self._objective = DistillationObjective(objective, teacher, self._terms)
        self._weight = weight
        self._regression = regression

    def __call__(self, model: nn.Module, batch: LabelledBatch) -> StepLoss:
        return self._objective(model, _WithHiddenStates(batch))

    def _terms(self, student: BertOutput, taught: BertOutput, batch: _WithHiddenStates) -> dict[str, Tensor]:
        hidden = hidden_mse(student.hidden_states, taught.hidden_states, batch.tokens_in_step, student.real_BS)
        ours, theirs = student.predictions[0], taught.predictions[0]
        if self._regression:
            prediction = prediction_mse(ours[:, 0], theirs[:, 0], batch.examples_in_step)
        else:
            prediction = symmetric_kl(ours, theirs, batch.examples_in_step)
        return {"teacher_hidden": self._weight * hidden, "teacher_prediction": self._weight * prediction}


@dataclass(frozen=True)
class _WithHiddenStates:
    """A batch that asks the model for its hidden states too."""

    batch: LabelledBatch

    @property
    def inputs(self) -> tuple[Any, ...]:
        return (self.batch.token_BS, self.batch.length_B, self.batch.type_BS, True)

    @property
    def label_B(self) -> Tensor:
        return self.batch.label_B

    @property
    def examples_in_step(self) -> int:
        return self.batch.examples_in_step

    @property
    def tokens_in_step(self) -> int:
        return self.batch.tokens_in_step
