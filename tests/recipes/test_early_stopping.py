"""``train.patience``: a run ends for want of progress, its best weights are tested, and it can be interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.engine.checkpoint.files import best_of, checkpoints_of, complete_directories, newest_checkpoint
from tests.helpers.commands import Outcome, dist_moe, signalled, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, summary_of, tensors_of, write_config

EVERY, PATIENCE, MOST = 5, 3, 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """A learning rate with which the validation loss soon gets worse; dropout, lest random numbers do not matter."""
    return write_config(
        tmp_path_factory.mktemp("patience"),
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}, "permutation": {"epochs": 0.3, "schedule": "paper"}},
        train={
            "max_steps": MOST,
            "validate_every": EVERY,
            "patience": PATIENCE,
            "checkpoint_every": 7,
            "log_every": EVERY,
            "keep_checkpoints": 2,
        },
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.01}}},
    )


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[int, Path]:
    """By number of ranks, as many as expert-parallel ones: runs that nobody stopped."""
    whole = {world: config.parent / f"whole-{world}" for world in (1, 2)}
    for world, run in whole.items():
        succeed(world, "train", "--run-dir", run, config, f"parallel.expert_parallel_size={world}")
    return whole


def validation_losses(run: Path) -> dict[int, float]:
    trainer = json.loads((newest_checkpoint(run) / "trainer.json").read_text())
    return {int(step): loss for step, loss in trainer["validation_losses"].items()}


def best_step(run: Path) -> int:
    losses = validation_losses(run)
    return min(losses, key=losses.__getitem__)


def best_tensors(run: Path) -> dict[str, Tensor]:
    (directory,) = complete_directories(best_of(checkpoints_of(run)))
    assert directory.name == f"step-{best_step(run):08d}"
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def test_patience_ends_the_run(runs: dict[int, Path]) -> None:
    run = runs[1]
    losses = validation_losses(run)
    best, last = best_step(run), max(losses)
    assert list(losses) == list(range(EVERY, last + 1, EVERY))
    assert EVERY < best == last - PATIENCE * EVERY
    assert last < MOST
    assert [record["step"] for record in records_of(run)] == list(range(1, last + 1))
    summary = summary_of(run)
    assert (summary["steps"], summary["tested_step"]) == (last, best)
    assert losses[best] == pytest.approx(summary["val"]["loss"], rel=1e-6)  # chosen by the validation part alone
    assert newest_checkpoint(run).name == f"step-{last:08d}"


def test_the_best_weights_are_the_ones_tested(runs: dict[int, Path], config: Path, tmp_path: Path) -> None:
    """They are those of a run that ends at the best step; the last weights would give other metrics."""
    best, last = best_step(runs[1]), max(validation_losses(runs[1]))
    for steps in (best, last):
        succeed(
            1, "train", "--run-dir", tmp_path / str(steps), config, "train.patience=null", f"train.max_steps={steps}"
        )
        assert not best_of(checkpoints_of(tmp_path / str(steps))).exists()
        assert summary_of(tmp_path / str(steps))["tested_step"] == steps
    assert summary_of(tmp_path / str(best))["test"] == summary_of(runs[1])["test"]
    assert summary_of(tmp_path / str(last))["test"]["loss"] != summary_of(runs[1])["test"]["loss"]
    assert_equal_tensors(best_tensors(runs[1]), tensors_of(tmp_path / str(best)))
    assert_equal_tensors(tensors_of(runs[1]), tensors_of(tmp_path / str(last)))


@pytest.mark.parametrize("world", [1, 2])
def test_evaluate_takes_the_best(runs: dict[int, Path], world: int) -> None:
    again = json.loads(succeed(world, "evaluate", runs[1], "--json")[0].out)
    assert again["checkpoint"] == f"step-{best_step(runs[1]):08d}"
    for metric in ("auc", "bce", "mse", "loss"):
        assert again["test"][metric] == pytest.approx(summary_of(runs[1])["test"][metric], abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("validations", [1, -PATIENCE, -1])
def test_a_stop_in_between_changes_nothing(
    config: Path, runs: dict[int, Path], tmp_path: Path, world: int, validations: int
) -> None:
    """Stopped at the first validation; PATIENCE before the last, where one rank has its best; before the last."""
    last = max(validation_losses(runs[world]))
    at_step = EVERY * validations if validations > 0 else last + EVERY * validations
    run = tmp_path / "run"
    arguments = ["train", "--run-dir", str(run), str(config), f"parallel.expert_parallel_size={world}"]
    outcomes: list[Outcome] = on_ranks(world, signalled, signal.SIGTERM, at_step, 0, arguments)
    assert all(outcome.code == 128 + signal.SIGTERM for outcome in outcomes)
    assert newest_checkpoint(run).name == f"step-{at_step:08d}"
    assert not (run / "summary.json").exists()
    succeed(world, "train", "--resume", run)
    assert_same_end(run, runs[world])


def assert_same_end(run: Path, reference: Path) -> None:
    assert validation_losses(run) == validation_losses(reference)
    ours, theirs = summary_of(run), summary_of(reference)
    for key in ("test", "steps", "tested_step"):
        assert ours[key] == theirs[key], key
    assert_equal_tensors(tensors_of(run), tensors_of(reference))
    assert_equal_tensors(best_tensors(run), best_tensors(reference))


def test_going_on_from_before_the_best(runs: dict[int, Path], config: Path, tmp_path: Path) -> None:
    """The best checkpoint of steps that the run did before it was set back does not speak for it."""
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    shutil.rmtree(checkpoints_of(run))
    succeed(1, "train", "--run-dir", tmp_path / "begun", config, f"train.max_steps={EVERY}")
    shutil.copytree(checkpoints_of(tmp_path / "begun"), checkpoints_of(run))
    succeed(1, "train", "--resume", run, f"train.max_steps={EVERY + 1}")
    assert list(validation_losses(run)) == [EVERY, EVERY + 1]
    assert summary_of(run)["tested_step"] == EVERY + 1
    assert newest_checkpoint(run).name == f"step-{EVERY + 1:08d}"
    kept = [directory.name for directory in complete_directories(best_of(checkpoints_of(run)))]
    assert kept in ([], [newest_checkpoint(run).name])


def test_a_run_that_patience_ended_is_at_its_end(runs: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    succeed(1, "train", "--resume", run)
    assert_same_end(run, runs[1])
    assert summary_of(run)["first_step"] == summary_of(run)["steps"]


def test_patience_that_is_taken_back(runs: dict[int, Path], tmp_path: Path) -> None:
    """Without patience the last weights are tested, and no best ones are left to speak for the run."""
    run, last = tmp_path / "run", max(validation_losses(runs[1]))
    shutil.copytree(runs[1], run)
    assert best_step(run) < last
    succeed(1, "train", "--resume", run, "train.patience=null", f"train.max_steps={last}")
    assert summary_of(run)["tested_step"] == last
    assert complete_directories(best_of(checkpoints_of(run))) == []
    assert_equal_tensors(tensors_of(run), tensors_of(runs[1]))
    assert summary_of(run)["test"]["loss"] != summary_of(runs[1])["test"]["loss"]


def test_the_last_step_is_validated_too(config: Path, tmp_path: Path) -> None:
    succeed(1, "train", "--run-dir", tmp_path / "run", config, "train.max_steps=8")
    losses = validation_losses(tmp_path / "run")
    assert list(losses) == [5, 8]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert summary_of(tmp_path / "run")["tested_step"] == best_step(tmp_path / "run")


def test_a_best_checkpoint_that_is_damaged_is_not_passed_over(runs: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (directory,) = complete_directories(best_of(checkpoints_of(run)))
    os.truncate(directory / "dense.safetensors", 100)
    (outcome,) = dist_moe(1, "evaluate", run)
    assert outcome.code == 2
    assert str(directory / "dense.safetensors") in outcome.err
