"""launch/slurm.sbatch, with stand-ins for Slurm's programs: who the ranks are told to be, and when a job goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import REPOSITORY, Outcome, finish, succeed, wait_for_steps
from tests.helpers.runs import losses_of, tensors_of, write_config
from tests.launch.slurm_stand_ins import write_slurm

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
RANK_VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]

TRAINER = f"""#!{sys.executable} -SE
import json, os, pathlib, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
names = {[*RANK_VARIABLES, "OMP_NUM_THREADS"]}
said = {{"arguments": sys.argv[1:]}} | {{name: os.environ[name] for name in names}}
file = pathlib.Path(os.environ["TOLD"]) / os.environ["RANK"]
file.with_suffix(".new").write_text(json.dumps(said))
file.with_suffix(".new").rename(file)
if "CODE" in os.environ:
    sys.exit(int(os.environ["CODE"]))
time.sleep(60)
"""


class Job:
    """A job of 2 nodes, whose ranks note in ``told`` what they were told, or train."""

    def __init__(self, directory: Path, tasks_per_node: int, hosts: str, **programs: str) -> None:
        self.told = directory / "told"
        self.told.mkdir()
        self.requeued = directory / "requeued"
        self._programs = write_slurm(directory / "bin", **programs)
        self._variables = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": str(2 * tasks_per_node),
            "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
            "HOSTS": hosts,
            "TOLD": str(self.told),
            "REQUEUED": str(self.requeued),
        }

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self._programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | self._variables | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_ranks(self, number: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60
        while len(files := [file for file in self.told.iterdir() if not file.suffix]) < number:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [json.loads(file.read_text()) for file in sorted(files)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, 3, "first-node second-node", python=TRAINER)


def test_what_the_ranks_are_told(job: Job) -> None:
    outcome = finish(job.start("c.yaml", "a run", "seed=1 2", CODE="0"))
    assert outcome.code == 0, outcome.err
    ranks = job.wait_for_ranks(6)
    assert [[int(rank[name]) for name in RANK_VARIABLES[:4]] for rank in ranks] == [
        [0, 6, 0, 3],
        [1, 6, 1, 3],
        [2, 6, 2, 3],
        [3, 6, 0, 3],
        [4, 6, 1, 3],
        [5, 6, 2, 3],
    ]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"first-node"}
    (port,) = {int(rank["MASTER_PORT"]) for rank in ranks}
    assert 1024 < port < 2**16
    command = ["-m", "dist_moe", "train", "c.yaml", "--run-dir", "a run", "--auto-resume", "seed=1 2"]
    assert all(rank["arguments"] == command for rank in ranks)


@pytest.mark.parametrize(
    ("number", "goes_on"),
    [(signal.SIGUSR1, True), (signal.SIGTERM, False)],
    ids=["the time is up", "the job is cancelled"],
)
def test_a_job_that_is_told_to_stop(job: Job, number: signal.Signals, goes_on: bool) -> None:
    process = job.start("c.yaml", "run")
    job.wait_for_ranks(6)
    process.send_signal(number)
    assert finish(process).code == 143
    assert job.requeued.exists() == goes_on
    if goes_on:
        assert job.requeued.read_text() == f"{os.getpid()}\n"


def test_a_job_that_fails_is_not_put_back(job: Job) -> None:
    assert finish(job.start("c.yaml", "run", CODE="2")).code == 2
    assert not job.requeued.exists()


def test_a_job_without_a_run_directory(job: Job) -> None:
    outcome = finish(job.start("c.yaml"))
    assert (outcome.code, outcome.err[:6]) == (2, "usage:")


@pytest.mark.slow
def test_two_nodes_train_in_two_turns(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    """The run is the one that was never interrupted, bit for bit."""
    config = write_config(tmp_path / "config", tiny_data, train={"max_steps": 45, "log_every": 5})
    layout = "parallel.expert_parallel_size=2"
    succeed(2, "train", config, "--run-dir", tmp_path / "reference", layout)
    job, run = Job(tmp_path, 1, "127.0.0.1 127.0.0.1"), tmp_path / "run"

    process = job.start(config, run, layout)
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGUSR1)
    stopped: Outcome = finish(process)
    assert stopped.code == 143, stopped.err
    assert job.requeued.read_text().split() == [str(os.getpid())]
    assert not (run / "summary.json").exists()

    outcome = finish(job.start(config, run, layout, SLURM_RESTART_COUNT="1"))
    assert outcome.code == 0, outcome.err
    assert "after 2 turn(s)" in outcome.out
    assert losses_of(run).tolist() == losses_of(tmp_path / "reference").tolist()
    ours, theirs = tensors_of(run), tensors_of(tmp_path / "reference")
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
