"""A run directory that is renamed, removed or replaced while it is trained: noticed, and never made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback, Validation
from dist_moe.engine.checkpoint.files import checkpoints_of, newest_checkpoint
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss, Trainer, fit
from dist_moe.errors import UserError
from tests.helpers.board import read_board, steps_of
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of

STEPS, AT = 12, 5
SETTINGS = TrainConfig(batch_size=8, epochs=9, max_steps=STEPS, log_every=3, checkpoint_every=4, patience=9)


class Numbers:
    """Rows of eight numbers a step, this rank's share of them."""

    steps_per_epoch = 6

    def __init__(self, environment: LaunchEnvironment) -> None:
        self._mine = slice(environment.rank * 8 // environment.world_size, (environment.rank + 1) * 8)

    def micro_batches(self, step: int) -> list[Tensor]:
        return [torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[self._mine]]


class Disturbance(Callback):
    """Does ``how`` to the run directory on rank 0 after step AT."""

    def __init__(self, root: Path, how: str) -> None:
        self._root, self._how = root, how

    def after_step(self, trainer: Trainer, step: int) -> None:
        if step != AT or not trainer.groups.environment.is_rank_zero:
            return
        if self._how == "removed":
            shutil.rmtree(self._root)
        else:
            self._root.rename(self._root.with_name("elsewhere"))
        if self._how == "replaced":
            self._root.mkdir()


def trained(root: Path, how: str) -> str:
    """The error's sentence; empty where it was trained to the end."""
    environment = LaunchEnvironment.read()
    torch.manual_seed(0)
    model, run = nn.Linear(3, 1), RunDirectory(root)
    kept = newest_checkpoint(root) if checkpoints_of(root).exists() else None
    validation = Validation(lambda trainer, step: {"loss": 1.0 / step}, 2, at_end=True)
    callbacks = [validation, Disturbance(root, how)] if how else [validation]
    with process_groups(environment, ParallelConfig()) as groups:
        feed = Numbers(environment)
        try:
            fit(
                model,
                feed,
                lambda m, x: StepLoss((m(x) - x.sum(1, True)).square().mean()),
                SETTINGS,
                run=run,
                resume_from=kept,
                callbacks=callbacks,
                groups=groups,
            )
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["renamed", "replaced"])
def test_it_ends_with_a_checkpoint_where_it_is(tmp_path: Path, world: int, how: str) -> None:
    root, now = tmp_path / "run", tmp_path / "elsewhere"
    for sentence in on_ranks(world, trained, root, how):
        for part in (f"{root} is {now}", "renamed", "--resume"):
            assert part in sentence
    assert list(root.iterdir()) == [] if how == "replaced" else not root.exists()
    assert newest_checkpoint(now).name == "step-00000006"
    assert on_ranks(world, trained, now, "") == [""] * world
    assert [record["step"] for record in records_of(now)] == list(range(1, STEPS + 1))
    assert steps_of(read_board(now), "loss/task") == list(range(1, STEPS + 1))
    assert all("run_directory_moved" not in record for record in records_of(now))
    on_ranks(world, trained, tmp_path / "undisturbed", "")
    losses = [[record["loss"] for record in records_of(run)] for run in (now, tmp_path / "undisturbed")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("world", [1, 2])
def test_one_that_is_removed_stays_so(tmp_path: Path, world: int) -> None:
    root = tmp_path / "run"
    for sentence in on_ranks(world, trained, root, "removed"):
        assert f"{root} was removed" in sentence
    assert list(tmp_path.iterdir()) == []
