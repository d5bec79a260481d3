"""The loss of a step, with a teacher where the configuration names one: MoEBERT's and COMET-BERT's distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dist_moe.engine.process_groups import ProcessGroups
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.distillation import DistillationObjective, MoEBERTConfig, Teacher, Terms
from dist_moe.recipes.objective import WeightedObjective
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.text_problem import TextProblem


def build_objective(
    config: RunConfig, problem: Problem, groups: ProcessGroups, shares: int
) -> WeightedObjective | DistillationObjective:
    """What ``config`` says is to become smaller. Raises UserError if its teacher is not intact or does not fit.

    What hidden states and predictions differ from the teacher's is recorded as ``teacher_hidden`` and
    ``teacher_prediction``, weighted.
    """
    objective = WeightedObjective(problem, config.task_weights, shares)
    if config.distillation is None:
        return objective
    assert isinstance(problem, TextProblem), "RunConfig.check lets no other problem have a teacher"
    teacher = Teacher(problem.trained(config.distillation.teacher, groups.world).to(groups.device))
    terms = _recorded(MoEBERTConfig(weight=config.distillation.weight).terms)
    return DistillationObjective(objective, teacher, terms, ask={"hidden_states": True})


def _recorded(terms: Terms) -> Terms:
    def named(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        return {f"teacher_{name}": term for name, term in terms(student, teacher, batch).items()}

    return named
