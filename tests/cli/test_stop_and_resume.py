"""SIGTERM or SIGINT, then --resume: the run is the one that was never interrupted, step for step, bit for bit."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine.checkpoint.files import newest_checkpoint, verify_checkpoint
from dist_moe.engine.monitor.step_window import MACHINE_METRICS
from tests.helpers.commands import Outcome, finish, signalled, start, succeed, wait_for_steps
from tests.helpers.pool import free_port, on_ranks
from tests.helpers.runs import assert_same_end, records_of, tensors_of, write_config

STEPS, STAGE_STEPS, STEPS_PER_EPOCH = 45, 38, 90


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Dropout makes random numbers matter; the permutation is learned, and the rate warms up, most of the time."""
    return write_config(
        tmp_path_factory.mktemp("config"),
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}, "permutation": {"epochs": STAGE_STEPS / STEPS_PER_EPOCH}},
        train={"max_steps": STEPS, "log_every": 5, "validate_every": 15},
        deepspeed={
            "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": STEPS}},
        },
    )


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks, as many as expert-parallel ones."""
    runs = {world: tmp_path_factory.mktemp("uninterrupted") / str(world) for world in (1, 2)}
    for world, run in runs.items():
        succeed(world, "train", "--run-dir", run, config, f"parallel.expert_parallel_size={world}")
    return runs


def steps_and_what_they_gave(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in MACHINE_METRICS} for record in records_of(run)]


def assert_same_run(run: Path, reference: Path) -> None:
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps_and_what_they_gave(run), steps_and_what_they_gave(reference), strict=True):
        assert ours == theirs
    assert_same_end(run, reference, STEPS)


def assert_stopped_in_the_stage(run: Path) -> int:
    """A good checkpoint of the last step that was recorded, and no summary; the step."""
    step = verify_checkpoint(newest_checkpoint(run)).step
    assert 0 < step < STAGE_STEPS
    assert [record["step"] for record in records_of(run)] == list(range(1, step + 1))
    assert not (run / "summary.json").exists()
    return step


def test_one_process(config: Path, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(sys.executable, "-m", "dist_moe", "train", "--run-dir", run, config)
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code == 128 + signal.SIGTERM == 143, stopped.err
    assert "Traceback" not in stopped.err
    assert f"--resume {run}" in stopped.err
    step = assert_stopped_in_the_stage(run)

    resumed = finish(start(sys.executable, "-m", "dist_moe", "train", "--resume", run))
    assert resumed.code == 0, resumed.err
    assert f"from step {step} " in resumed.err
    assert "auc" in resumed.out
    assert_same_run(run, uninterrupted[1])


def test_two_processes_of_torchrun(config: Path, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = ["torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "dist_moe"]
    process = start(*launch, "train", "--run-dir", run, config, "parallel.expert_parallel_size=2")
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code != 0
    assert_stopped_in_the_stage(run)
    succeed(2, "train", "--resume", run)
    assert_same_run(run, uninterrupted[2])


def test_two_emulated_ranks(config: Path, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("dist-moe", "train", config, "--emulate", 2, "--run-dir", run, "parallel.expert_parallel_size=2")
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert "over 2 of 2 rank(s)" in stopped.err
    assert stopped.err.count(f"--resume {run}") == 1
    assert_stopped_in_the_stage(run)
    succeed(2, "train", "--resume", run)
    assert_same_run(run, uninterrupted[2])


@pytest.mark.parametrize(
    ("world", "rank", "number", "at_step"),
    [(1, 0, signal.SIGINT, 1), (2, 1, signal.SIGTERM, 13), (2, 0, signal.SIGINT, 30)],
)
def test_a_signal_to_one_rank_stops_all(
    config: Path, uninterrupted: dict[int, Path], tmp_path: Path, world: int, rank: int, number: int, at_step: int
) -> None:
    """At once; at a step that is collected together with later ones; at a validation."""
    run = tmp_path / "run"
    arguments = ["train", "--run-dir", str(run), str(config), f"parallel.expert_parallel_size={world}"]
    outcomes: list[Outcome] = on_ranks(world, signalled, number, at_step, rank, arguments)
    assert [outcome.code for outcome in outcomes][rank] == 128 + number
    assert all(outcome.code > 128 for outcome in outcomes)
    stopped_at = assert_stopped_in_the_stage(run)
    assert at_step <= stopped_at < at_step + 5
    succeed(world, "train", "--resume", run)
    assert_same_run(run, uninterrupted[world])


def test_a_run_that_is_finished_may_be_resumed(uninterrupted: dict[int, Path]) -> None:
    run = uninterrupted[1]
    before = records_of(run), tensors_of(run), (run / "summary.json").read_text()
    (outcome,) = succeed(1, "train", "--resume", run)
    assert records_of(run) == before[0]
    assert json.loads((run / "summary.json").read_text())["test"] == json.loads(before[2])["test"]
    assert "auc" in outcome.out


def test_more_steps_than_were_planned(config: Path, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """A run of 20 steps that is given more after all."""
    run = tmp_path / "run"
    succeed(1, "train", "--run-dir", run, config, "train.max_steps=20")
    succeed(1, "train", "--resume", run, f"train.max_steps={STEPS}")
    assert_same_run(run, uninterrupted[1])
