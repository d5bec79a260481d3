"""A teacher is asked and never changes, whatever is done to the student that holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.models import RecommenderConfig, RunShape
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import DHKDConfig, Teacher
from dist_moe.search import PermutationSearchConfig
from tests.helpers.parity import masters_of
from tests.helpers.pool import on_ranks
from tests.helpers.students import DIM, Student, objective_of, student_engine, take_step


def network() -> nn.Sequential:
    """Its dropout and its batch statistics would show that it trains."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


class Holder(nn.Module):
    """A student that keeps its teacher as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, 3)
        self.teacher = Teacher(network())


def test_check_h4_a_student_that_trains_does_not_make_its_teacher_train() -> None:
    holder, x_BD = Holder(), torch.randn(4, DIM)
    holder.train()
    first, state = holder.teacher(x_BD), {k: v.clone() for k, v in holder.teacher.model.state_dict().items()}
    holder.teacher.model.train()  # somebody else's hand on it
    holder.teacher.model[2].train()
    for _ in range(3):
        assert torch.equal(holder.teacher(x_BD), first)
    assert {k: torch.equal(v, state[k]) for k, v in holder.teacher.model.state_dict().items()} == dict.fromkeys(
        state, True
    )


def test_it_is_in_no_parameter_list_and_no_checkpoint_and_has_no_gradient() -> None:
    holder, x_BD = Holder(), torch.randn(4, DIM)
    assert {name for name, _ in holder.named_parameters()} == set(holder.state_dict()) == {"layer.weight", "layer.bias"}
    taught = holder.teacher(x_BD)
    assert not taught.requires_grad
    (holder.layer(x_BD) - taught).square().sum().backward()
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in holder.teacher.model.parameters()
    )


def test_it_draws_no_random_numbers() -> None:
    teacher, x_BD = Teacher(network()), torch.randn(4, DIM)
    before = torch.get_rng_state()
    teacher(x_BD)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_permutation_that_was_being_learnt_counts_rounded() -> None:
    sizes = {"embedding_dim": 4, "num_experts": 4, "experts": {"units": 6}, "tower_units": 5}
    config = RecommenderConfig(**sizes, permutation=PermutationSearchConfig(epochs=1))
    model = config.build(10, 10, RunShape(SingleWorld(), steps_per_epoch=10))
    model.begin_step(0)
    table = model.tables["moe"]
    with torch.no_grad():
        table.soft.copy_(torch.eye(4).roll(1, dims=1).expand_as(table.soft))
    Teacher(model)
    assert table.table.flatten().tolist() == [1, 2, 3, 0]


Course = tuple[dict[str, Tensor], list[float], list[str], int]


def courses(ep: int, stage: int) -> list[Course]:
    """Three steps without a teacher, and with one whose loss weighs nothing: masters, norms, the engine's names, and
    how many numbers its optimizer owns on this rank."""
    found = []
    adam = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0}}
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        for teacher in (None, network()):
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            student = Student(groups.world, "linear", dropout=0.2)
            with student_engine(groups, student, adam, zero_optimization=zero, gradient_clipping=0.5) as engine:
                objective = objective_of(engine, teacher, DHKDConfig(weight=0.0))
                norms = []
                for step in range(3):
                    take_step(engine, objective, step)
                    norms.append(engine.grad_norm)
                names = [name for name, _ in engine.module.named_parameters()]
                found.append((masters_of(engine), norms, names, _owned(engine)))
    return found


def _owned(engine: Any) -> int:
    if engine.shards_parameters:
        return sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    inner = engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer
    return sum(parameter.numel() for group in inner.param_groups for parameter in group["params"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_the_engine_the_student_is_laid_out_and_trained_as_without_it(stage: int) -> None:
    for alone, taught in on_ranks(2, courses, 2, stage):
        assert taught[1:] == alone[1:]
        assert [name for name, tensor in alone[0].items() if not torch.equal(tensor, taught[0][name])] == []


def sharded_teacher() -> str:
    adam = {"type": "AdamW", "params": {"lr": 0.01}}
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups,
        student_engine(groups, Student(groups.world), adam, zero_optimization={"stage": 3}) as engine,
    ):
        try:
            Teacher(engine.module)
        except ValueError as error:
            return str(error)
    return "accepted"


def test_a_model_of_which_an_engine_holds_slices_is_refused() -> None:
    assert "needs its parameters whole" in on_ranks(1, sharded_teacher)[0]
