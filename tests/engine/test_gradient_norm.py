"""The global gradient norm over dense and expert parameters is the true one, and clipping goes by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.engine.deepspeed.engine import global_grad_norm
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from tests.helpers.pool import on_ranks
from tests.helpers.toys import Toy, toy_engine

SLOPES = [2.0, 4.0, 6.0, 8.0]
NORM_OF_EXPERTS = math.sqrt(120)
STAGES = [0, 1, 2, 3]
LIMITS = [0.0, 1.0, 5.0, 100.0]


def norms_of_gradients_by_hand() -> tuple[float, float]:
    """Ours and DeepSpeed's, of expert gradients {2, 4} on rank 0 and {6, 8} on rank 1."""
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=2)) as groups,
        toy_engine(groups, 4, optimizer=sgd) as engine,
    ):
        model: Toy = engine.module
        model.dense.grad = torch.zeros(1)
        model.experts.weight.grad = torch.tensor([SLOPES[e] for e in model.experts.expert_ids]).unsqueeze(1)
        ours = float(global_grad_norm(model, groups))
        clip = import_deepspeed().runtime.utils.clip_grad_norm_
        return ours, float(clip(list(model.parameters()), max_norm=1e9))


def test_norm_of_experts_on_two_ranks() -> None:
    for ours, deepspeeds in on_ranks(2, norms_of_gradients_by_hand):
        assert ours == pytest.approx(NORM_OF_EXPERTS, abs=1e-6) == pytest.approx(10.954451, abs=1e-6)
        assert abs(deepspeeds - NORM_OF_EXPERTS) > 1, "DeepSpeed is right by now: the correction can go"


Step = tuple[float, Tensor, Tensor]


def clipped_steps(ep: int, stage: int, slope: float) -> list[Step]:
    """For each limit a step of SGD at learning rate 1, which subtracts the clipped gradient. Experts' slopes are the
    same on all ranks and sum over them, hence the division."""
    steps = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        for limit in LIMITS:
            section = {
                "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
                "zero_optimization": {"stage": stage},
                "gradient_clipping": limit,
            }
            with toy_engine(groups, 4, **section) as engine:
                engine.backward(engine(slope, [value * ep for value in SLOPES]))
                engine.step()
                model: Toy = engine.module
                before = 100.0 + torch.tensor(model.experts.expert_ids)
                moved = 10.0 - model.dense.detach(), before - model.experts.weight.detach().squeeze(1)
                steps.append((engine.grad_norm, *moved))
    return steps


@pytest.mark.parametrize("slope", [0.0, 3.0])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (2, 1)])
def test_a_step_is_clipped_by_the_true_norm(world_size: int, ep: int, stage: int, slope: float) -> None:
    norm = math.sqrt(120 + slope**2)
    by_rank = on_ranks(world_size, clipped_steps, ep, stage, slope)
    for limit, *steps in zip(LIMITS, *by_rank, strict=True):
        scale = min(1.0, limit / norm) if limit else 1.0
        moved_E = torch.cat([moved for _, _, moved in steps[:ep]])
        for reported, moved, _ in steps:
            assert reported == pytest.approx(norm, rel=1e-6)
            assert moved.item() == pytest.approx(slope * scale, abs=2e-5)
        torch.testing.assert_close(moved_E, scale * torch.tensor(SLOPES), rtol=0, atol=2e-5)


def idle_expert(ep: int, section: dict[str, Any]) -> Tensor:
    """Two steps in which only expert 0 gets a gradient; what the experts are then."""
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups,
        toy_engine(groups, 4, **section) as engine,
    ):
        for _ in range(2):
            engine.backward(engine(0.0, [1.0, 0.0, 0.0, 0.0]))
            engine.step()
        weight: Tensor = engine.module.experts.weight.detach().squeeze(1)
        return weight


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_an_expert_without_tokens_still_steps(world_size: int, ep: int, stage: int) -> None:
    section = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    weight_E = torch.cat(on_ranks(world_size, idle_expert, ep, section))
    decayed = (100.0 + torch.arange(4)) * (1 - 0.1 * 0.01) ** 2
    torch.testing.assert_close(weight_E[1:], decayed[1:], rtol=1e-6, atol=0)
    assert weight_E[0] < decayed[0] - 0.1
