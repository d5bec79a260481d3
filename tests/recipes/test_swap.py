"""Swap search on a task: how its examples are shared out makes no difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.data.batches import spread_over
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig, search_swaps
from dist_moe.recipes.callbacks.table_search import in_double_precision
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.search import SearchReport, SwapSearchConfig
from dist_moe.tasks import build_model
from dist_moe.tasks.task import Task
from tests.helpers.runs import write_config

LAUNCH = LaunchEnvironment()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> SupervisedConfig:
    return load_config(write_config(tmp_path_factory.mktemp("swap"), tiny_data, model={"num_experts": 8}))


@pytest.fixture(scope="module")
def task(config: SupervisedConfig) -> Task:
    return config.data.open(progress=False)


def scrambled(config: SupervisedConfig, task: Task) -> MoEModel:
    model = build_model(config, task, SingleWorld())
    model.tables["moe"].table.copy_(torch.randperm(8, generator=torch.Generator().manual_seed(0)))
    return model


def searched(config: SupervisedConfig, task: Task, model: MoEModel, batch_size: int) -> SearchReport:
    search = SwapSearchConfig(examples=512, batch_size=batch_size)
    return search_swaps(task, model, search, config.target_weights, LAUNCH)


def test_the_size_of_a_batch_changes_the_last_bits_of_fp64_only(config: SupervisedConfig, task: Task) -> None:
    """Products of other shapes round otherwise: in fp32 these losses differ by 1e-7."""
    once, often = scrambled(config, task), scrambled(config, task)
    expected = searched(config, task, once, batch_size=512)
    found = searched(config, task, often, batch_size=37)
    assert len(expected.swaps) > 0
    assert found.swaps == expected.swaps
    assert found.losses == pytest.approx(expected.losses, rel=1e-13)
    assert torch.equal(often.tables["moe"].table, once.tables["moe"].table)


def test_all_of_validation_is_looked_at(config: SupervisedConfig, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's table goes from domain to domain: the first examples would be of the first domain."""
    table, seen = type(task.val), []
    batch = table.batch

    def spied(self: object, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> object:
        assert self is task.val
        seen.extend(index_B.tolist())
        return batch(self, index_B, step_index)

    monkeypatch.setattr(table, "batch", spied)
    search_swaps(task, scrambled(config, task), SwapSearchConfig(examples=20), config.target_weights, LAUNCH)
    assert seen == spread_over(len(task.val), 20).tolist()
    assert seen[-1] > 0.9 * len(task.val)


def test_weights_are_what_and_where_they_were(config: SupervisedConfig, task: Task) -> None:
    model = scrambled(config, task)
    before = {name: (x.data_ptr(), x.clone()) for name, x in model.named_parameters()}
    searched(config, task, model, batch_size=512)
    for name, x in model.named_parameters():
        address, value = before[name]
        assert x.data_ptr() == address
        assert x.dtype == torch.float32
        assert torch.equal(x, value)


def test_precision_is_restored_after_an_error() -> None:
    model = torch.nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="running_mean"), in_double_precision(model):
        model(torch.zeros(2, 4, dtype=torch.float64))
    with in_double_precision(model):
        assert model.weight.dtype == model.running_mean.dtype == torch.float64
        assert model.num_batches_tracked.dtype == torch.int64
    assert model.weight.dtype == model.running_mean.dtype == torch.float32


@pytest.mark.parametrize(("steps_per_epoch", "due"), [(243, 49), (268, 54), (528, 106), (3, 1)])
def test_the_first_search_is_due_whatever_rounding_does(steps_per_epoch: int, due: int) -> None:
    schedule = SwapScheduleConfig(every_epochs=0.2, until_epoch=0.2)
    assert [step for step in range(1, steps_per_epoch) if schedule.due(step, steps_per_epoch)] == [due]


def test_a_search_that_is_never_due_is_refused(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    path = write_config(tmp_path, tiny_data, train={"max_steps": 2})
    with pytest.raises(UserError, match=r"swap_search\.every_epochs=1: the first search would follow .* ends after 2"):
        plan_new_run(path, ["swap_search={every_epochs: 1}"], tmp_path / "run")
