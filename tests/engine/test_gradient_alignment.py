"""Two losses' gradients, merged as one flat projection over all parameters would, in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.deepspeed.gradient_alignment import GradientAlignment, check_alignment
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import UserError
from dist_moe.models.dual_head import AuxiliaryHead
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import DHKDConfig
from dist_moe.tasks.objective import WeightedObjective
from tests.helpers.parity import masters_of
from tests.helpers.pool import on_ranks
from tests.helpers.students import (
    BATCH,
    EXPERTS,
    Labelled,
    Labels,
    Oracle,
    Student,
    auxiliary_terms,
    objective_of,
    step_of_examples,
    student_engine,
    take_step,
)

DHKD = DHKDConfig(weight=3.0, align_gradients=True)
AGREEING, CONTRADICTING = 4.0, -4.0
CONTRADICTING_MLP = 8.0
SGD = {"type": "SGD", "params": {"lr": 1.0}}
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How a step is taken, and by which teacher."""

    confidence: float
    stage: int
    accumulation: int = 1
    auxiliary: AuxiliaryHead = "linear"


CASES = [
    *(Case(confidence, stage) for confidence in (AGREEING, CONTRADICTING) for stage in (0, 1, 2)),
    *(Case(CONTRADICTING, stage, accumulation=3) for stage in (0, 2)),
    Case(CONTRADICTING_MLP, 1, auxiliary="mlp"),
]
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]


def student_of(case: Case, world: Any) -> Student:
    student = Student(world, case.auxiliary)
    if case.auxiliary == "mlp":
        assert student.head.auxiliary is not None
        student.head.auxiliary[1].p = 0.0  # dropout differs from layout to layout
    if case.accumulation > 1:
        student.gate.balance_weight = 0.0  # type: ignore[assignment]  # which is a statistic of a micro-batch
    return student


def steps_of_engine(ep: int, cases: list[Case]) -> list[tuple[Numbers, float]]:
    """For each case what a step of SGD at rate 1 subtracts, by name and expert, and the recorded cosine's part."""
    found = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        for case in cases:
            options = {
                "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 50},
                "gradient_accumulation_steps": case.accumulation,
            }
            with student_engine(groups, student_of(case, groups.world), SGD, **options) as engine:
                before = masters_of(engine)
                sums = take_step(engine, objective_of(engine, Oracle(case.confidence), DHKD), 0)
                after = masters_of(engine)
                moved = {name: before[name].double() - after[name].double() for name in before}
                found.append((moved, float(sums["teacher_cosine"])))
    return found


@cache
def flat_gradients(case: Case, start: int = 0, stop: int = BATCH) -> tuple[Numbers, Tensor, Tensor]:
    """(names -> zeros of their shapes, g_1, g_2): of rows of the step by plain torch in fp64, flattened."""
    student, whole = student_of(case, SingleWorld()).double().train(), step_of_examples(0)
    x_BD, label_B = whole.x_BD[start:stop].double(), whole.label_B[start:stop]
    batch = Labelled(x_BD, label_B, len(x_BD))
    output = student(x_BD)
    leading = WeightedObjective(Labels(), (1.0,), 1).of_output(output, batch).loss
    following = auxiliary_terms(DHKD)(output, Oracle(case.confidence).double()(x_BD).detach(), batch)["dhkd"]
    parameters = dict(student.named_parameters())
    flat = []
    for loss in (leading, following):
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        both = zip(grads, parameters.values(), strict=True)
        flat.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in both]))
    return {name: torch.zeros_like(p) for name, p in parameters.items()}, flat[0], flat[1]


def projected(first: Tensor, second: Tensor) -> Tensor:
    inner = second @ first
    return first + second - inner.clamp(max=0) / (first @ first) * first


def flattened(moved: Numbers, like: Numbers) -> Tensor:
    """In the order of the flat gradients; experts one after the other, as in a whole bank."""
    columns = []
    for name in like:
        experts = [f"{name}|{e}" for e in range(EXPERTS)]
        columns += [moved[one].flatten() for one in (experts if experts[0] in moved else [name])]
    return torch.cat(columns)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_is_that_of_one_flat_projection_in_fp64(layout: tuple[int, int]) -> None:
    ranks, ep = layout
    by_rank = on_ranks(ranks, steps_of_engine, ep, CASES)
    for i, case in enumerate(CASES):
        like, first, second = flat_gradients(case)
        moved: Numbers = {}
        for rank in range(ranks):
            moved |= by_rank[rank][i][0]
        difference = (flattened(moved, like) - projected(first, second)).abs().max().item()
        assert difference < 1e-6, (case, difference)
        cosine = sum(by_rank[rank][i][1] for rank in range(ranks))
        assert cosine == pytest.approx(torch.cosine_similarity(first, second, dim=0).item(), abs=1e-5)


def test_the_cases_agree_and_contradict() -> None:
    """And by so much that leaving the projection out would be seen, or projecting on each rank for itself."""
    for case in CASES:
        _, first, second = flat_gradients(case)
        inner, size = float(second @ first), float(first @ first)
        assert (inner > 0.05 * size) if case.confidence == AGREEING else (inner < -0.05 * size)
        added = projected(first, second) - first  # what contradicts is taken out, what agrees is left
        assert (added - second).abs().max() < 1e-9 if inner > 0 else abs(float(added @ first)) < 1e-9 * size
        if case.auxiliary == "linear" and case.confidence == CONTRADICTING:
            halves = [flat_gradients(case, *rows)[1:] for rows in ((0, BATCH // 2), (BATCH // 2, BATCH))]
            alone = sum(projected(*half) for half in halves) / 2
            assert (alone - projected(first, second)).abs().max() > 1e-4


def sharded() -> str:
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups,
        student_engine(groups, Student(groups.world), SGD, zero_optimization={"stage": 3}) as engine,
    ):
        try:
            GradientAlignment(engine)
        except UserError as error:
            return str(error)
    return "accepted"


def test_sharded_parameters_are_refused_by_the_field_with_a_remedy() -> None:
    (message,) = on_ranks(1, sharded)
    assert "deepspeed.zero_optimization.stage=3" in message
    assert "choose 0, 1 or 2" in message
    for stage in (0, 1, 2):
        check_alignment(stage)
