"""Numbers of a window of steps: one row per step, shapes kept, micro-batches added."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.monitor.step_window import StepWindow, Sums, add_sums
from dist_moe.engine.training import seed_step
from tests.helpers.pool import on_ranks


def windows() -> list[list[dict[str, float | list[float]]]]:
    rank = int(LaunchEnvironment.read().rank)
    with process_groups(LaunchEnvironment.read(), ParallelConfig()):
        window = StepWindow()
        reduced = [window.reduce()]
        for step in range(2):
            load = torch.tensor([[1, rank]])
            window.add({"a": torch.tensor(float(step + rank)), "load": load, "b": step - rank, "c": [1.0, 2.0 * rank]})
        reduced += [window.reduce(), window.reduce()]
        assert dist.get_world_size() > rank
        return reduced


@pytest.mark.parametrize("world_size", [1, 2])
def test_sums_over_ranks_step_by_step(world_size: int) -> None:
    ranks = sum(range(world_size))
    size = float(world_size)
    steps = [
        {"a": step * size + ranks, "load": [[size, ranks]], "b": step * size - ranks, "c": [size, 2.0 * ranks]}
        for step in (0, 1)
    ]
    for reduced in on_ranks(world_size, windows):
        assert reduced == [[], steps, []]


def test_add_sums() -> None:
    one: Sums = {"a": torch.tensor(1.0), "load": torch.tensor([1, 2]), "b": 2.5, "c": [1.0, 2.0]}
    added = add_sums([one, one, one])
    assert added["a"] == 3
    assert torch.equal(added["load"], torch.tensor([3, 6]))
    assert (added["b"], added["c"]) == (7.5, [3.0, 6.0])


def draws(seed: int, step: int, rank: int) -> tuple[float, ...]:
    seed_step(seed, step, rank)
    return tuple(torch.rand(3).tolist())


def test_every_seed_step_and_rank_draws_its_own_numbers() -> None:
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 999_999) for rank in (0, 1, 63)]
    assert len({draws(*key) for key in keys}) == len(keys)
    assert draws(1, 2, 3) == draws(1, 2, 3)


@pytest.mark.parametrize("seed", [2**31 - 1, 2**32])
def test_any_seed_that_torch_takes_will_do(seed: int) -> None:
    assert draws(seed, 5, 1) == draws(seed, 5, 1)
