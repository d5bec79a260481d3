"""The same command again: after an interruption, after kill -9 of a rank, with fewer ranks than before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories
from dist_moe.engine.health.heartbeats import read_heartbeat
from tests.helpers.commands import finish, signalled, start, succeed, wait_for_steps
from tests.helpers.pool import free_port, on_ranks
from tests.helpers.runs import assert_same_end, largest_difference, records_of, tensors_of, write_config

from .conftest import Refused

STEPS, EVERY = 24, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config"),
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}},
        train={"max_steps": STEPS, "log_every": 4, "checkpoint_every": EVERY},
    )


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> dict[int, Path]:
    runs = {world: config.parent / f"undisturbed-{world}" for world in (1, 2)}
    for world, run in runs.items():
        succeed(world, *command(config, run, world))
    return runs


def command(config: Path, run: Path, ep: int, *overrides: str) -> list[str]:
    layout = f"parallel.expert_parallel_size={ep}"
    return ["train", str(config), "--run-dir", str(run), "--auto-resume", layout, *overrides]


def assert_same_run(run: Path, reference: Path) -> None:
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records_of(run)] == [record["loss"] for record in records_of(reference)]
    assert_same_end(run, reference, STEPS)


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_the_same_command_twice(
    config: Path, undisturbed: dict[int, Path], tmp_path: Path, has_checkpoint: bool
) -> None:
    """Before the first checkpoint it begins again, afterwards it goes on."""
    run = tmp_path / "run"
    on_ranks(1, signalled, signal.SIGTERM, 13, 0, command(config, run, 1))
    assert records_of(run)
    if not has_checkpoint:
        shutil.rmtree(checkpoints_of(run))
    (outcome,) = succeed(1, *command(config, run, 1))
    assert ("from step" in outcome.err) == has_checkpoint
    assert_same_run(run, undisturbed[1])


def test_another_run_is_not_gone_on_with(
    config: Path, undisturbed: dict[int, Path], refused: Refused, tmp_path: Path
) -> None:
    refused(command(config, undisturbed[1], 1, "seed=7"), "seed=7", "was trained with 0")
    refused(["train", "--resume", undisturbed[1], "--auto-resume"], "--auto-resume")


def test_a_file_cut_short_by_a_kill_stops_nobody(config: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """What is written beside its place and left there is neither read nor in the way."""
    run = Path(shutil.copytree(undisturbed[1], tmp_path / "run"))
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "summary.json"):
        (run / f".{name}.partial").write_text("{")
    shutil.rmtree(complete_directories(checkpoints_of(run))[-1])
    succeed(1, *command(config, run, 1))
    assert_same_run(run, undisturbed[1])


def test_fewer_ranks(config: Path, undisturbed: dict[int, Path], refused: Refused, tmp_path: Path) -> None:
    """Two ranks, then one: refused with a sentence, or on with all experts on one rank where that is allowed."""
    run = tmp_path / "run"
    on_ranks(2, signalled, signal.SIGTERM, 13, 1, command(config, run, 2))
    step = records_of(run)[-1]["step"]
    refused(command(config, run, 2), "parallel.expert_parallel_size=2", "parallel.elastic=true")
    (outcome,) = succeed(1, *command(config, run, 2, "parallel.elastic=true"))
    assert "4 experts over 1 of 1 rank(s), ZeRO stage 1, " in outcome.err
    assert f"from step {step} " in outcome.err
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert largest_difference(tensors_of(run), tensors_of(undisturbed[2])) < 0.2  # dropout draws by rank


def pid_of(rank: int, run: Path) -> int:
    beats = [read_heartbeat(directory, rank) for directory in (run / "heartbeats").glob("*")]
    (beat,) = [beat for beat in beats if beat is not None]
    return beat.process.pid


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    while not complete_directories(checkpoints_of(run)):
        assert process.poll() is None, finish(process).err
        time.sleep(0.01)


def test_a_killed_rank_is_replaced(config: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """kill -9 under torchrun --max-restarts: the job starts again by itself and ends as if nothing had been."""
    run = tmp_path / "run"
    launch = ["torchrun", "--nproc-per-node", 2, "--max-restarts", 3, "--monitor-interval", 0.1]
    launch += ["--master-port", free_port(), "-m", "dist_moe"]
    process = start(*launch, *command(config, run, 2))
    wait_for_checkpoint(run, process)
    os.kill(pid_of(1, run), signal.SIGKILL)
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    assert "from step" in outcome.err
    assert_same_run(run, undisturbed[2])


def test_a_rank_whose_launcher_is_killed_ends(config: Path, tmp_path: Path) -> None:
    """Else it would train on, beside the job that is started in its place."""
    run = tmp_path / "run"
    process = start(
        "torchrun",
        "--nproc-per-node",
        1,
        "--master-port",
        free_port(),
        "-m",
        "dist_moe",
        *command(config, run, 1, "train.max_steps=100000"),
    )
    wait_for_steps(run, 1, process)
    pid = pid_of(0, run)
    process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.communicate()


@pytest.mark.slow
def test_a_machine_is_lost(config: Path, tmp_path: Path) -> None:
    """Two launchers of one rank each, one of which is killed: the other goes on alone, with all experts."""
    run, port = tmp_path / "run", free_port()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    meeting += ["--rdzv-conf", "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3"]
    launch = ["torchrun", "--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 5, *meeting]
    launch += ["--local-addr", "127.0.0.1", "--monitor-interval", 0.1, "-m", "dist_moe"]
    train = command(config, run, 2, "parallel.elastic=true", "train.max_steps=200", "train.checkpoint_every=20")
    first = start(*launch, *train)
    time.sleep(2)  # so that the first one hosts the meeting point
    second = start(*launch, *train)
    wait_for_steps(run, 30, first)
    second.kill()
    second.communicate()
    outcome = finish(first)
    assert outcome.code == 0, outcome.err
    assert "4 experts over 2 of 2 rank(s)" in outcome.err
    assert "4 experts over 1 of 1 rank(s)" in outcome.err
    assert [record["step"] for record in records_of(run)] == list(range(1, 201))
