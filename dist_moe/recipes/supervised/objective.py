"""The loss of a step, with a teacher where the configuration names one: as MoEBERT follows it, or as DHKD does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.gradient_alignment import GradientAlignment
from dist_moe.recipes.distillation import DHKDSection, DistillationObjective, Teacher, Terms
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.objective import WeightedObjective
from dist_moe.tasks.task import Task


def build_objective(
    config: RunConfig, task: Task, engine: ExpertParallelEngine, shares: int
) -> WeightedObjective | DistillationObjective:
    """What ``config`` says is to become smaller. Raises UserError if its teacher is not intact or does not fit.

    What the student differs from its teacher is recorded, weighted: ``teacher_hidden`` and ``teacher_prediction``, or
    of an auxiliary head ``teacher_auxiliary``.
    """
    objective, section = WeightedObjective(task, config.target_weights, shares), config.distillation
    if section is None:
        return objective
    assert isinstance(task, LabelledTextTask), "RunConfig.check lets no other task have a teacher"
    groups = engine.process_groups
    teacher = Teacher(task.trained(section.teacher, groups.world).to(groups.device))
    if isinstance(section, DHKDSection):
        alignment = GradientAlignment(engine) if section.align_gradients else None
        return DistillationObjective(objective, teacher, _recorded(section.terms), alignment)
    return DistillationObjective(objective, teacher, _recorded(section.terms), ask={"hidden_states": True})


def _recorded(terms: Terms) -> Terms:
    def named(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        return {f"teacher_{name}": term for name, term in terms(student, teacher, batch).items()}

    return named
