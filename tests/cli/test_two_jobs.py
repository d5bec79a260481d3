"""Two jobs on one run directory: one goes on, the other is told who holds it, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_moe.config.files import parse_json
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, verify_checkpoint
from dist_moe.engine.monitor import run_lock
from dist_moe.engine.monitor.run_lock import take
from tests.helpers.commands import finish, run_here, start, succeed, wait_for_steps
from tests.helpers.pool import RankPool, free_port
from tests.helpers.runs import content_of, records_of, summary_of, tensors_of, write_config

from .conftest import Refused

STEPS, EVERY, LAUNCH_VARIABLES = 40, 8, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    train = {"max_steps": STEPS, "log_every": 2, "checkpoint_every": EVERY}
    return write_config(tmp_path_factory.mktemp("config"), tiny_data, train=train)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    succeed(1, "train", config, "--run-dir", config.parent / "finished", "train.max_steps=8")
    return config.parent / "finished"


def hold(root: Path, told: Any) -> None:
    lock = take(root)  # held for as long as it is known
    lock.begin()
    told.send("held")
    time.sleep(60)


@pytest.fixture
def held_run(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A run in which a job works, and the number of its process."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(run, theirs))
    process.start()
    ours.recv()
    yield run, process.pid
    process.kill()
    process.join()


@pytest.mark.parametrize(
    "way", ["fresh", "resume", "auto", "auto with another seed", "emulated resume", "emulated auto"]
)
def test_the_second_is_told_who_holds_it(
    refused: Refused, config: Path, held_run: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_FOR_END_S", 0.2)
    run, pid = held_run
    before = content_of(run)
    arguments = {
        "fresh": ["train", config, "--run-dir", run],
        "resume": ["train", "--resume", run],
        "auto": ["train", config, "--run-dir", run, "--auto-resume"],
        "auto with another seed": ["train", config, "--run-dir", run, "--auto-resume", "seed=7"],
        "emulated resume": ["train", "--emulate", "2", "--resume", run],
        "emulated auto": ["train", "--emulate", "2", config, "--run-dir", run, "--auto-resume"],
    }[way]
    refused(arguments, str(run), f"in use by process {pid} on ", "since 20", "Wait for that job or stop it")
    assert content_of(run) == before


def test_other_commands_that_write_into_it_are_refused_too(
    refused: Refused, finished: Path, held_run: tuple[Path, int], tmp_path: Path
) -> None:
    run, pid = held_run
    shutil.rmtree(checkpoints_of(run))
    (run / "config.yaml").unlink()
    succeed(1, "export", finished, tmp_path / "weights.safetensors")
    for arguments in (
        ["import", tmp_path / "weights.safetensors", run],
        ["reshard", finished, "--output", run, "--expert-files", 2],
        ["search", finished, "--output", run],
    ):
        refused(arguments, str(run), f"in use by process {pid}")
    assert not checkpoints_of(run).exists()
    assert succeed(1, "evaluate", finished)[0].out  # reading needs no lock


def job(arguments: list[str], delay_s: float, killed_after_s: float | None, told: str) -> int:
    """Run a command in a process of its own, which was imported before; returns its exit code."""
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    time.sleep(delay_s)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            outcome = run_here(arguments)
            Path(told).write_text(json.dumps([outcome.code, outcome.err]))
        finally:
            os._exit(0)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status


def one_of(jobs: list[tuple[Any, ...]]) -> int:
    """Each rank of the pool does one of the jobs."""
    return job(*jobs[int(os.environ["RANK"])])


def at_once(jobs: list[tuple[list[object], float, float | None]], directory: Path) -> list[tuple[int, str] | None]:
    """Exit codes and what was said; None of those that were killed."""
    told = [directory / f"told-{i}" for i in range(len(jobs))]
    texts = [
        ([str(a) for a in arguments], *rest, str(path)) for (arguments, *rest), path in zip(jobs, told, strict=True)
    ]
    pool = RankPool(len(jobs))  # fresh: what other tests have mapped could be too much to fork once more
    try:
        pool.run(one_of, (texts,))
    finally:
        pool.close()
    outcomes = [tuple(json.loads(path.read_text())) if path.exists() else None for path in told]
    for path in told:
        path.unlink(missing_ok=True)
    return outcomes


def ways(config: Path, run: Path) -> dict[str, list[object]]:
    return {
        "fresh": ["train", config, "--run-dir", run],
        "fresh with another seed": ["train", config, "--run-dir", run, "seed=1"],
        "auto": ["train", config, "--run-dir", run, "--auto-resume"],
        "auto with another seed": ["train", config, "--run-dir", run, "--auto-resume", "seed=1"],
        "resume": ["train", "--resume", run],
    }


REFUSALS = re.compile(
    r"in use by process \d+ on .+ since|holds a run already|seed=\d: the run was trained|is not a run directory"
)


def seed_of(run: Path) -> int:
    seed: int = yaml.safe_load((run / "config.yaml").read_text())["seed"]
    return seed


def check_whole(run: Path, references: dict[int, Path]) -> int:
    """The run is that of one seed, whole, as if nobody had disturbed it; returns the seed."""
    seed = seed_of(run)
    reference = references[seed]
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records_of(run)] == [record["loss"] for record in records_of(reference)]
    for checkpoint in complete_directories(checkpoints_of(run)):
        verify_checkpoint(checkpoint)
    ours, theirs = tensors_of(run), tensors_of(reference)
    assert all(ours[name].equal(theirs[name]) for name in ours | theirs)
    assert summary_of(run)["test"] == summary_of(reference)["test"]
    assert not list(run.glob("*.lock"))
    return seed


@pytest.fixture(scope="module")
def references(config: Path) -> dict[int, Path]:
    runs = {seed: config.parent / f"seed-{seed}" for seed in (0, 1)}
    for seed, run in runs.items():
        succeed(1, "train", config, "--run-dir", run, f"seed={seed}")
    return runs


def test_two_fresh_starts_at_once(config: Path, references: dict[int, Path], tmp_path: Path) -> None:
    commands = ways(config, tmp_path / "run")
    outcomes = at_once([(commands["fresh"], 0.0, None), (commands["fresh with another seed"], 0.0, None)], tmp_path)
    codes = [outcome[0] for outcome in outcomes if outcome]
    assert sorted(codes) == [0, 2]
    refusal = next(outcome[1] for outcome in outcomes if outcome and outcome[0] == 2)
    assert REFUSALS.search(refusal), refusal
    assert check_whole(tmp_path / "run", references) == codes.index(0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_fifty_random_starts(config: Path, references: dict[int, Path], tmp_path: Path, seed: int) -> None:
    """Two commands in random ways with a random delay between them, on nothing, or on a run that was killed somewhere;
    every third time one of them is killed, too. Then the run is brought to its end and is the undisturbed one."""
    chance = random.Random(seed)
    for number in range(50):
        run = tmp_path / f"run-{number}"
        commands = ways(config, run)
        if chance.random() < 0.5:
            at_once([(commands["fresh"], 0.0, chance.uniform(0.2, 1.5))], tmp_path)
        names = [chance.choice(list(commands)) for _ in range(2)]
        killed = [chance.uniform(0.1, 1.5) if chance.random() < 1 / 6 else None for _ in range(2)]
        delays = [0.0, chance.choice([0.0, chance.uniform(0, 0.1), chance.uniform(0, 1.5)])]
        chance.shuffle(delays)
        plan = [(commands[name], delay, kill) for name, delay, kill in zip(names, delays, killed, strict=True)]
        outcomes = at_once(plan, tmp_path)
        for outcome in outcomes:
            assert outcome is None or outcome[0] == 0 or REFUSALS.search(outcome[1]), (number, names, outcome)
            assert outcome is None or outcome[0] in (0, 2), (number, names, outcome)
        if None not in outcomes and any(not name.startswith("resume") for name in names):
            assert run.exists()
        if (run / "config.yaml").exists():
            command = commands["auto with another seed" if seed_of(run) else "auto"]
        else:
            command = commands["auto"]
        ((code, said),) = [outcome for outcome in at_once([(command, 0.0, None)], tmp_path) if outcome]
        assert code == 0, (number, names, said)
        check_whole(run, references)
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["emulated", "torchrun"])
def test_a_job_of_two_ranks_is_left_alone(config: Path, tmp_path: Path, launcher: str) -> None:
    """While it trains, others are refused; when its first rank is killed, the next takes over at once."""
    run = tmp_path / "run"
    train = ["train", config, "--run-dir", run, "train.max_steps=100000", "parallel.expert_parallel_size=2"]
    by = ["torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "dist_moe", *train]
    process = start(*by) if launcher == "torchrun" else start("dist-moe", *train, "--emulate", 2)
    try:
        wait_for_steps(run, EVERY + 2, process)
        others = [
            ["train", "--resume", run],
            ["train", config, "--run-dir", run, "--auto-resume"],
            ["train", config, "--run-dir", run, "--auto-resume", "seed=1"],
            ["train", config, "--run-dir", run],
            ["train", "--resume", run, "--emulate", 2],
            ["train", config, "--run-dir", run, "--auto-resume", "--emulate", 2],
        ]
        for arguments in others:
            outcome = finish(start("dist-moe", *arguments))
            assert outcome.code == 2, outcome.err
            assert "in use by process" in outcome.err
            assert process.poll() is None
        (lock,) = run.glob("*.lock")
        os.kill(parse_json(lock.read_text())["process"]["pid"], signal.SIGKILL)
        assert finish(process).code != 0
    finally:
        process.kill()
    steps = records_of(run)[-1]["step"]
    outcome = finish(
        start("dist-moe", "train", "--resume", run, f"train.max_steps={steps + 10}", "parallel.expert_parallel_size=1")
    )
    assert outcome.code == 0, outcome.err
    assert [record["step"] for record in records_of(run)] == list(range(1, steps + 11))
