"""``fit`` as a library: again and again on one model in one set of groups, at every ZeRO stage; what it records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe import record
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Trainer, fit
from tests.helpers.fits import ROWS, Model, Rows, objective
from tests.helpers.pool import on_ranks


def deepspeed(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": zero}


def trained(stage: int, ep: int, lengths: list[int]) -> dict[str, Tensor]:
    """Parameters of this rank after fits of so many steps one after the other, on consecutive rows."""
    environment = LaunchEnvironment.read()
    with process_groups(environment, ParallelConfig(expert_parallel_size=ep)) as groups:
        torch.manual_seed(0)
        model, first = Model(groups), 0
        for steps in lengths:
            settings = TrainConfig(max_steps=steps, batch_size=ROWS)
            result = fit(
                model, Rows(environment, first), objective, settings, deepspeed=deepspeed(stage), groups=groups
            )
            assert (result.model, result.steps, result.interrupted) == (model, steps, False)
            first += steps
        assert all(p.dtype == torch.float32 and p.numel() for p in model.parameters())
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", range(4))
def test_two_fits_are_one_of_their_length(stage: int) -> None:
    whole, parts = (on_ranks(2, trained, stage, 2, lengths) for lengths in ([5], [2, 3]))
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
    (alone,) = on_ranks(1, trained, 0, 1, [5])
    torch.testing.assert_close(whole[0]["head.weight"], alone["head.weight"], rtol=0, atol=1e-5)


class Numbers(Callback):
    """Records numbers of all three kinds, of which rank 1 knows one more; keeps what comes back."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def before_step(self, trainer: Trainer, step: int) -> None:
        rank = trainer.groups.environment.rank
        for value in (rank, rank + 2):
            record("all/sum", value, "sum")
            record("all/mean", torch.tensor(float(value)))
            record("all/max", value, "max")
        if rank == 1 and step == 2:
            record("one/mean", 5.0)

    def on_records(self, trainer: Trainer, records: list[Mapping[str, Any]]) -> None:
        self.records += [dict(of_step) for of_step in records]


def recorded() -> list[dict[str, Any]]:
    environment, numbers = LaunchEnvironment.read(), Numbers()
    record("nobody/hears", 1.0)
    with process_groups(environment, ParallelConfig(expert_parallel_size=2)) as groups:
        settings = TrainConfig(max_steps=4, batch_size=ROWS, log_every=2)
        fit(Model(groups), Rows(environment), objective, settings, groups=groups, callbacks=[numbers])
    return numbers.records


def test_recorded_numbers_are_reduced_over_calls_and_ranks() -> None:
    for records in on_ranks(2, recorded):
        assert [of_step["step"] for of_step in records] == [1, 2, 3, 4]
        for of_step in records:
            assert (of_step["all/sum"], of_step["all/mean"], of_step["all/max"]) == (6.0, 1.5, 3.0)
            assert of_step.get("one/mean") == (5.0 if of_step["step"] == 3 else None)
            assert "nobody/hears" not in of_step
