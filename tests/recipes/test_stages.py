"""Stages on shares of the ranks at once: each sees its share as all there is, and finished ones are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.signals import StopRequest
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss
from dist_moe.parallel import sum_over_ranks
from dist_moe.recipes import validate_config
from dist_moe.recipes.recipe import RunStart
from dist_moe.recipes.stages import Interrupted, Stage, Stages
from tests.helpers.pool import on_ranks

STEPS = 4


class Numbers:
    """Rows of eight numbers a step, this rank's share of them."""

    steps_per_epoch = STEPS

    def __init__(self, rank: int, size: int) -> None:
        self._mine = slice(rank * 8 // size, (rank + 1) * 8 // size)

    def micro_batches(self, step: int) -> list[Tensor]:
        return [torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[self._mine]]


def learnt(stage: Stage, scale: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    feed = Numbers(stage.environment.rank, stage.environment.world_size)
    stage.fit(
        model, feed, lambda m, x: StepLoss((m(x) - scale * x.sum(1, True)).square().mean()), TrainConfig(batch_size=8)
    )
    ranks = float(sum_over_ranks(torch.ones(())))
    return {"ranks": ranks, "weight": model.weight.detach().flatten().tolist()}


def stages_in(root: str) -> Stages:
    start = RunStart(validate_config({"trackers": ["jsonl"]}), RunDirectory(Path(root)), LaunchEnvironment.read())
    return Stages(start, StopRequest())


def run_three(root: str) -> dict[str, Any]:
    stages = stages_in(root)
    functions = {name: lambda stage, scale=i: learnt(stage, scale) for i, name in enumerate(("a", "b", "c"), start=1)}
    found = stages.run_at_once(functions)
    assert stages.run("b", lambda stage: pytest.fail("it has finished already")) == found["b"]
    return found


def one_fails(root: str) -> None:
    def fail(stage: Stage) -> None:
        raise RuntimeError("before the first step")

    with pytest.raises(RuntimeError, match="before the first step"):
        stages_in(root).run("a", fail)


def test_shares_train_at_once_as_one_process_would(tmp_path: Path) -> None:
    on_ranks(1, one_fails, str(tmp_path / "1"))
    RunDirectory(tmp_path / "1").check_unused()  # what failed is in nobody's way
    assert not RunDirectory(tmp_path / "1").has_progress
    (alone,) = on_ranks(1, run_three, str(tmp_path / "1"))
    for directory in ("1", "1/stages/a", "1/stages/c"):
        assert (tmp_path / directory / "config.yaml").is_file()
    for world, share in ((2, 1), (4, 2)):
        for found in on_ranks(world, run_three, str(tmp_path / str(world))):
            for name, result in found.items():
                assert result["ranks"] == share
                torch.testing.assert_close(torch.tensor(result["weight"]), torch.tensor(alone[name]["weight"]))
    assert len({tuple(result["weight"]) for result in alone.values()}) == 3


def one_is_asked_to_stop(root: str) -> bool:
    def stop(stage: Stage) -> None:
        raise Interrupted(15)

    try:
        stages_in(root).run_at_once({"done": lambda stage: learnt(stage, 1.0), "stopped": stop})
    except Interrupted:
        return (Path(root) / "stages" / "stopped" / "result.json").exists()
    raise AssertionError("a rank went on")


def test_where_one_stops_all_do(tmp_path: Path) -> None:
    assert on_ranks(2, one_is_asked_to_stop, str(tmp_path)) == [False, False]


def run_two(root: str, until: int) -> dict[str, Any]:
    """Two stages at once on a rank each, which stop after ``until`` steps with a checkpoint at every step."""

    def fit(stage: Stage, scale: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        settings = TrainConfig(batch_size=8, max_steps=until, checkpoint_every=1)
        feed = Numbers(stage.environment.rank, stage.environment.world_size)
        stage.fit(model, feed, lambda m, x: StepLoss((m(x) - scale * x.sum(1, True)).square().mean()), settings)
        return {"weight": model.weight.detach().flatten().tolist()}

    return stages_in(root).run_at_once({"a": lambda stage: fit(stage, 1.0), "b": lambda stage: fit(stage, 2.0)})


def test_the_rank_that_decides_for_its_share_reads_every_byte(tmp_path: Path) -> None:
    """The second stage's only rank is not the first of its node; a bit of its newest checkpoint is flipped."""
    whole = on_ranks(2, run_two, str(tmp_path / "whole"), STEPS)
    on_ranks(2, run_two, str(tmp_path / "run"), 2)
    for result in (tmp_path / "run").rglob("result.json"):
        result.unlink()
    file = tmp_path / "run" / "stages" / "b" / "checkpoints" / "step-00000002" / "dense.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert on_ranks(2, run_two, str(tmp_path / "run"), STEPS) == whole
    assert (file.parent.with_name("step-00000002.damaged") / file.name).read_bytes() == content
