"""A router that is never trained is unknown to the engine: to its optimizer, its buckets and its steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.engine.deepspeed.parameter_state import read_parameter_state
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.gates import SMoEDropout
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import DHKDConfig
from tests.helpers.parity import owned_numbers
from tests.helpers.pool import on_ranks
from tests.helpers.students import EXPERTS, UNITS, Student, objective_of, student_engine, take_step

STEPS = 4
ADAM = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1}}


def frozen() -> SMoEDropout:
    return SMoEDropout(UNITS, EXPERTS, 1, EXPERTS, STEPS)


def trained(ep: int, stage: int) -> tuple[list[Tensor], list[Tensor], set[str], int, list[float]]:
    """The router before and after, the names with optimizer state, the numbers that the optimizer owns on this
    rank, and this rank's part of the experts per token in each step."""
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        student = Student(groups.world, None, gate=frozen)
        before = [student.gate.weight.clone(), student.gate.bias.clone()]
        with student_engine(groups, student, ADAM, zero_optimization={"stage": stage}) as engine:
            objective, active = objective_of(engine, None, DHKDConfig()), []
            for step in range(STEPS):
                student.begin_step(step)
                active.append(take_step(engine, objective, step)["active_experts"])
                student.end_step(skipped=False)
            after = [student.gate.weight.clone(), student.gate.bias.clone()]
            return before, after, set(read_parameter_state(engine).tensors), owned_numbers(engine), active


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_check_c1_the_router_is_bit_identical_and_in_no_optimizer_state_and_no_bucket(stage: int) -> None:
    plain = Student(SingleWorld(), None, gate=frozen)
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    names = {name for name, _ in plain.named_parameters()}
    assert not any("gate" in name for name in names)
    ((before, after, known, in_buckets, active),) = on_ranks(1, trained, 1, stage)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert before[0].abs().min() > 0
    assert known == names
    assert in_buckets == numbers
    assert active == [1, 2, 3, 3]  # 1 + round(3 t / 4), halves to even


@pytest.mark.parametrize("stage", [1, 3])
def test_check_c1_on_two_ranks_it_is_the_same_one(stage: int) -> None:
    ours, theirs = on_ranks(2, trained, 2, stage)
    for before, after in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.equal(before, after)
    assert torch.equal(ours[0][0], ours[1][0])
