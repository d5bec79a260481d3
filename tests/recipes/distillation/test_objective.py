"""A step with a teacher: what is added, what is recorded, and the limits in which nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.models.dual_head import AuxiliaryHead
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import DHKDConfig, DistillationObjective, Teacher
from dist_moe.tasks.objective import WeightedObjective
from tests.helpers.parity import masters_of
from tests.helpers.pool import on_ranks
from tests.helpers.students import (
    Labels,
    Oracle,
    Student,
    auxiliary_terms,
    objective_of,
    step_of_examples,
    student_engine,
    take_step,
)

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}}
STEPS = 4


def test_the_loss_of_a_step_is_the_sum_and_every_part_is_recorded() -> None:
    student, batch, shares = Student(SingleWorld()).train(), step_of_examples(0), 6
    plain = WeightedObjective(Labels(), (2.0,), shares)
    terms = auxiliary_terms(DHKDConfig(weight=0.5))
    result = DistillationObjective(plain, Teacher(Oracle(3.0)), terms)(student, batch)
    output, sums = student(batch.x_BD), result.sums
    assert {"loss", "total_loss", "ce", "dhkd", "load_balance", "load"} <= sums.keys()
    dhkd = terms(output, Oracle(3.0)(batch.x_BD), batch)["dhkd"]
    torch.testing.assert_close(sums["dhkd"], dhkd)
    torch.testing.assert_close(sums["total_loss"], 2 * sums["ce"] + sums["load_balance"] + dhkd)
    torch.testing.assert_close(result.loss, shares * sums["total_loss"])


def test_the_loss_of_the_labels_may_weigh_less_or_nothing() -> None:
    student, batch, shares = Student(SingleWorld()).train(), step_of_examples(0), 6
    plain = WeightedObjective(Labels(), (2.0,), shares, auxiliary=False)
    terms = auxiliary_terms(DHKDConfig(weight=0.5))
    for weight in (0.0, 0.25):
        result = DistillationObjective(plain, Teacher(Oracle(3.0)), terms, weight=weight)(student, batch)
        sums = result.sums
        assert "load_balance" not in sums
        torch.testing.assert_close(sums["total_loss"], weight * 2 * sums["ce"] + sums["dhkd"])
        torch.testing.assert_close(result.loss, shares * sums["total_loss"])


class Talkative(nn.Module):
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Student(SingleWorld())
        self.asked: list[int] = []

    def forward(self, x_BD: Tensor, times: int) -> Any:
        self.asked.append(times)
        return self.inner(x_BD)


def test_both_models_are_asked_alike() -> None:
    student, teacher, batch = Talkative(), Talkative(), step_of_examples(0)
    plain = WeightedObjective(Labels(), (1.0,), 1)

    def terms(ours: Any, theirs: Any, _: Any) -> dict[str, Tensor]:
        return {"gap": (ours.predictions[0] - theirs.predictions[0]).square().sum()}

    result = DistillationObjective(plain, Teacher(teacher), terms, ask={"times": 7})(student, batch)
    assert student.asked == teacher.asked == [7]
    assert result.sums["gap"].item() == 0


def course(
    ep: int, stage: int, auxiliary: AuxiliaryHead | None, teacher: nn.Module | None, align: bool
) -> dict[str, Tensor]:
    """The student's masters after some steps with dropout, accumulation and decay; the auxiliary head's left out."""
    config = DHKDConfig(weight=0.0, align_gradients=align)
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        options = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
        student = Student(groups.world, auxiliary, dropout=0.3)
        with student_engine(groups, student, ADAM, **options) as engine:
            objective = objective_of(engine, teacher, config)
            for step in range(STEPS):
                take_step(engine, objective, step)
            return {name: x for name, x in masters_of(engine).items() if not name.startswith("head.auxiliary")}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("align", [False, True])
def test_check_g5_a_teacher_that_weighs_nothing_changes_no_bit(stage: int, align: bool) -> None:
    """Not even with an auxiliary head of its own dropout, drawn between the student's of two micro-batches."""
    (plain,) = on_ranks(1, course, 1, stage, None, None, False)
    (taught,) = on_ranks(1, course, 1, stage, "mlp", Oracle(3.0), align)
    assert plain.keys() == taught.keys()
    assert [name for name in plain if not torch.equal(plain[name], taught[name])] == []


@pytest.mark.parametrize("align", [False, True])
def test_check_g5_on_two_ranks_with_experts_on_both(align: bool) -> None:
    plain = on_ranks(2, course, 2, 1, None, None, False)
    taught = on_ranks(2, course, 2, 1, "mlp", Oracle(3.0), align)
    for ours, theirs in zip(taught, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_teacher_that_weighs_something_changes_the_backbone() -> None:
    """Else the two tests above could not fail."""

    (plain,) = on_ranks(1, course, 1, 1, None, None, False)
    (taught,) = on_ranks(1, taught_course)
    assert (plain["below.weight"] - taught["below.weight"]).abs().max() > 1e-3


def taught_course() -> dict[str, Tensor]:
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        options = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}
        with student_engine(groups, Student(groups.world, "mlp", dropout=0.3), ADAM, **options) as engine:
            objective = objective_of(engine, Oracle(3.0), DHKDConfig(weight=1.0))
            for step in range(STEPS):
                take_step(engine, objective, step)
            return masters_of(engine)
